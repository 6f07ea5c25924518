"""A limit on the time of a block of Python code."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _OutOfTime(BaseException):
    """A BaseException, so that handlers of Exception in the block do not catch it."""


@contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raises ``error`` if the block runs for longer than ``seconds``.

    It interrupts Python code only. A call of C code, such as a tokenizer's, runs to its end.
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
    try:
        try:
            timer.start()
            yield
        finally:
            timer.cancel()
            with lock:
                ended = True
                raise_in(thread, None)  # a pending one must not arrive outside
    except _OutOfTime:
        raise error from None
