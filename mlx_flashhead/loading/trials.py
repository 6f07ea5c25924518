"""Says that steps of several tokens are tried, where nothing else is shown for that long."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..wide.trial import ANNOUNCEMENT, log

SENTENCE = (
    "Comparing steps of several tokens with single ones, and timing them, once on this machine. On "
    "a CPU that takes up to a minute."
)


class _Announced(logging.Handler):
    def __init__(self, say: Callable[[str], object]):
        super().__init__(logging.INFO)
        self._say = say
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        """Says the sentence at the first trial."""
        if record.msg == ANNOUNCEMENT and not self._said:
            self._said = True
            self._say(SENTENCE)


@contextmanager
def trials_said(say: Callable[[str], object]) -> Iterator[None]:
    """A block in which the first trial is said.

    Args:
        say: Takes the sentence.
    """
    handler = _Announced(say)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
