"""A thread that lets others have the processor first."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from threadpoolctl import ThreadpoolController

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


# The number of threads is the process's: two blocks would give it back in the wrong order.
_one_block = threading.Lock()


@contextmanager
def one_thread_less() -> Iterator[None]:
    """A block in which numpy multiplies with a thread less, and leaves a processor to others.

    The threads of a BLAS do not wait for others as the one that calls it does. Apple's Accelerate
    chooses their number itself. A second block waits for the end of the first.
    """
    with _one_block:
        threads = _blas_threads()
        number = max((each["num_threads"] for each in threads.info()), default=1)
        with threads.limit(limits=max(1, number - 1)):
            yield


@cache
def _blas_threads() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _set_class(number: int) -> None:
    # A system may have no classes.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).pthread_set_qos_class_self_np(number, 0)
