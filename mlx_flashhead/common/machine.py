"""What this machine is and does at the time."""

import os
import platform


def is_busy() -> bool:
    """Whether more processes want to run than this machine has cores."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except OSError:
        return False


def system() -> str:
    """The operating system, such as "macOS 26.1"; elsewhere without a version."""
    version = platform.mac_ver()[0]
    return f"macOS {version}" if version else platform.system()


def memory_bytes() -> int:
    """The memory of this machine, which on a Mac the GPU shares."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
