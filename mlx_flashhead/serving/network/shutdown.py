"""The end of a server: within seconds of a signal, whatever runs."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def let_signals_interrupt() -> None:
    """From now on a signal to end interrupts the main thread. A second one ends the process.

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

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, end)


def leave(code: int) -> NoReturn:
    """Ends the process at once, with all that was printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
