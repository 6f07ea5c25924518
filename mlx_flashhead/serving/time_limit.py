"""A limit on how long a block of Python code may run."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _OutOfTime(BaseException):
    """No Exception, so that no handler in the block takes it for one of its own."""


@contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raises ``error`` as soon as the block has run for so long.

    Only Python code is interrupted: a call of C code, such as a tokenizer's, runs to its end.

    Args:
        seconds: The limit.
        error: What is raised.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    lock = threading.Lock()
    ended = False

    def interrupt() -> None:
        with lock:
            if not ended:
                raise_in(thread, ctypes.py_object(_OutOfTime))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            timer.cancel()
            with lock:
                ended = True
                raise_in(thread, None)  # one that is on its way must not arrive outside
    except _OutOfTime:
        raise error from None
