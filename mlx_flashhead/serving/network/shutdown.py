"""The end of a server: within seconds of a signal, whatever runs."""

import os
import signal
import sys
from collections.abc import Callable
from threading import Event
from types import FrameType

LOOK_SECONDS = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Shutdown:
    """Within the block, a signal to end interrupts the main thread. A second one ends the process.

    C++ code in other threads aborts if the interpreter is finalized meanwhile. So neither the
    second signal nor :meth:`leave` finalizes it.
    """

    def __enter__(self) -> "Shutdown":
        self._asked = Event()
        self._before = {}
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
                self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, healthy: Callable[[], bool]) -> None:
        """Waits for a signal, or until ``healthy`` says False.

        Raises:
            KeyboardInterrupt: When a signal has come.
        """
        while healthy():
            Event().wait(LOOK_SECONDS)

    def leave(self, code: int) -> None:
        """Ends the process at once, with all that was printed."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            os._exit(128 + number)
        self._asked.set()
        raise KeyboardInterrupt
