"""A thread that lets others have the processor first."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NICENESS = 10
# Apple's classes of threads, in <sys/qos.h>.
_UTILITY = 0x11
_USER_INITIATED = 0x19


@contextmanager
def yielding() -> Iterator[None]:
    """A block in which this thread, and those that it starts, wait for others.

    Linux does not let a thread take its priority back: there the block lasts as long as the thread.
    """
    if sys.platform == "darwin":
        _set_class(_UTILITY)
    else:
        # The user may have set another limit.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    try:
        yield
    finally:
        if sys.platform == "darwin":
            _set_class(_USER_INITIATED)


def _set_class(number: int) -> None:
    # A system may have no classes.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).pthread_set_qos_class_self_np(number, 0)
