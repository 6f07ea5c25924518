"""The machine on which a figure was measured."""

import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.timing import in_turns, timer
from ..head.blas import blas_name
from ..version import __version__

PACKAGES = ("mlx", "mlx-lm", "numpy")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def machine() -> dict:
    """The machine, JSON-ready: processor, memory, versions, BLAS, threads."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": _cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": "cpu" if mx.default_device().type == mx.cpu else "gpu",
        "versions": {"mlx-flashhead": __version__}
        | {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "blas": blas_name(),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
    }
    if mx.metal.is_available():
        found["gpu"] = {key: str(value) for key, value in mx.device_info().items()}
        found["chip"] = chip()
        found["read_bandwidth_gb_s"] = read_bandwidth_gb_s()
    return found


def read_bandwidth_gb_s(rounds: int = 5) -> float:
    """Memory read by one reduction over 512 MB on the default device, in GB/s: the best run."""
    memory = mx.ones((512 << 20) // 4)
    mx.eval(memory)
    *_, seconds = in_turns({"read": timer(lambda _: mx.max(memory))}, rounds)
    return memory.nbytes / min(seconds["read"]) / 1e9


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def chip() -> str:
    """The processor as a name of a file: "Apple M3 Max" → "m3-max"."""
    return re.sub(r"[^a-z0-9]+", "-", _processor().lower().removeprefix("apple ")).strip("-")


def _sysctl(name: str) -> str:
    result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return result.stdout.strip()
