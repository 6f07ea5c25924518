"""What this machine is and does at the time."""

import os
import platform
import time

# Seconds for which it is looked, and the share of them that a thread gets where nobody else works.
LOOKED = 0.1
OWN_SHARE = 0.85


def is_busy() -> bool:
    """Whether others take this machine's processors: a thread that only computes gets less of one.

    The system's load would count what this process has done in the last minute, too.
    """
    began = time.perf_counter()
    began_computing = time.thread_time()
    while time.perf_counter() - began < LOOKED:
        pass
    computed = time.thread_time() - began_computing
    return computed < OWN_SHARE * (time.perf_counter() - began)


def system() -> str:
    """The operating system, such as "macOS 26.1"; elsewhere without a version."""
    version = platform.mac_ver()[0]
    if version:
        return f"macOS {version}"
    return platform.system()


def memory_bytes() -> int:
    """The memory of this machine, which on a Mac the GPU shares."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
