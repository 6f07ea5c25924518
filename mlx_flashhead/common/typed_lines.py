"""Lines that a user types: when a text of several lines ends, and the terminal's modes."""

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from .interrupts import cleanup

# They stand around several lines.
QUOTES = '"""'


def is_open(text: str) -> bool:
    """Whether a text begins with three quotes and the closing three are missing."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 6 or not text.endswith(QUOTES))


@contextmanager
def modes_kept() -> Iterator[None]:
    """A block after which a terminal's modes are as before, also if a signal ends the process."""
    if not sys.stdin.isatty():
        yield
        return
    modes = termios.tcgetattr(sys.stdin)
    with cleanup(lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)):
        yield
