"""Text of others, such as a model's or the Hub's, for a terminal.

It must not move the cursor, change colours or ring the bell, here or behind a pipe.
"""

import logging
from typing import TextIO

UNPRINTABLE = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters but line breaks and tabs."""
    return text.translate(UNPRINTABLE)


class PrintableOutput:
    """A stream that prints texts without control characters.

    Args:
        stream: The stream behind it.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what is printable."""
        self._stream.write(printable(text))
        return len(text)


class PrintableFormatter(logging.Formatter):
    """Formats lines of a log without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of a record."""
        return printable(super().format(record))
