"""Python runs this at its start in the programs that `scripts/hosts.py` compares.

It seeds MLX in each thread, so that a program that has no seed of its own draws the same tokens
each time, and stands in for the clock of macOS that MTPLX asks for.
"""

import ctypes
import threading
import time
from typing import Any

SEED = 7
REAL_LIBRARY = ctypes.CDLL
REAL_RUN = threading.Thread.run


def system() -> Any:
    """What stands in for macOS's libSystem: a clock in nanoseconds."""

    def mach_timebase_info(info: Any) -> None:
        info._obj.numer = info._obj.denom = 1

    def mach_continuous_time() -> int:
        return time.monotonic_ns()

    def nothing(*_: Any) -> int:
        return 0

    class System:
        sysctlbyname = staticmethod(nothing)
        pthread_set_qos_class_self_np = staticmethod(nothing)

    library = System()
    library.mach_timebase_info = mach_timebase_info  # type: ignore[attr-defined]
    library.mach_continuous_time = mach_continuous_time  # type: ignore[attr-defined]
    return library


def open_library(name: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Opens a library as `ctypes.CDLL` does, but for libSystem."""
    if "libSystem" in str(name):
        return system()
    return REAL_LIBRARY(name, *args, **kwargs)


def seed() -> None:
    """Seeds this thread's draws, where there is MLX."""
    try:
        import mlx.core as mx
    except ImportError:
        return
    mx.random.seed(SEED)


def run(thread: threading.Thread) -> None:
    """Runs a thread, seeded."""
    seed()
    REAL_RUN(thread)


ctypes.CDLL = open_library  # type: ignore[assignment, misc]
threading.Thread.run = run  # type: ignore[method-assign]
seed()
