"""The end of a server: within seconds of a signal, whatever runs."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """A block in which a signal to end interrupts the main thread. A second one ends the process.

    C++ code in other threads aborts if the interpreter is finalized meanwhile. So neither the
    second signal nor :func:`leave` finalizes it.
    """
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        raise KeyboardInterrupt

    ignored = signal.SIG_IGN  # as by nohup
    before = {n: signal.signal(n, end) for n in _SIGNALS if signal.getsignal(n) is not ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Ends the process at once, with all that was printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
