"""The clock by which the steps of a text are compared with each other."""

import time

from ..head.backend import gpu_is_default


def now() -> float:
    """Seconds of work: those that pass on a GPU, and those that this process computes on a CPU.

    Other processes take nothing from a CPU's seconds. Those of all threads are added. MLX computes
    in one of them, nearly all of the time. A BLAS that verifies in several ones counts more than it
    takes, so that no gain is overstated.
    """
    if gpu_is_default():
        return time.perf_counter()
    return time.process_time()
