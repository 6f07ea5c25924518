"""The machine on which a figure was measured."""

import os
import platform
import re
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from ..common.timing import timer
from ..head.portable import blas_name
from ..version import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def machine() -> dict:
    """The machine, JSON-ready: processor, memory, versions, BLAS, threads."""
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": "cpu" if mx.default_device().type == mx.cpu else "gpu",
        "versions": {"mlx-flashhead": __version__}
        | {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "blas": blas_name(),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }
    if mx.metal.is_available():
        about["gpu"] = {key: str(value) for key, value in mx.device_info().items()}
        about["chip"] = chip()
        about["read_bandwidth_gb_s"] = read_bandwidth_gb_s()
    return about


def read_bandwidth_gb_s() -> float:
    """Memory read by one reduction over 512 MB on the default device, in GB/s: the best run."""
    memory = mx.ones((512 << 20) // 4)
    return memory.nbytes / min(map(timer(lambda _: mx.max(memory)), range(6))) / 1e9


def _processor() -> str:
    return str(mx.device_info(mx.Device(mx.cpu, 0))["device_name"])


def chip() -> str:
    """The processor as a name of a file: "Apple M3 Max" → "m3-max"."""
    return re.sub(r"[^a-z0-9]+", "-", _processor().lower().removeprefix("apple ")).strip("-")
