"""How time is taken here: in turns, warm, over many runs; and on which machine.

What is compared runs in turns, one of each in a round, so that a machine that heats up or shares
its cores slows all alike. Each round has another order, so that none always follows the same: what
ran before leaves its pages and caches behind. The first round warms up and is not counted. Medians
and quartiles are kept, never means.
"""

import ctypes
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .apple_gpu import PEAK_GB_S

HEAD_ROUNDS = 5
CACHES_BYTES = 128 << 20  # more than the last cache of the machines that this is meant for
PACKAGES = ("mlx", "mlx-lm", "numpy")
Item = TypeVar("Item")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Spread:
    """Of a number of runs: the median, the quartiles around it, and how many there were."""

    median: float
    lower: float
    upper: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        lower, median, upper = (float(x) for x in np.percentile(values, (25, 50, 75)))
        return cls(median, lower, upper, len(values))

    def scaled(self, factor: float) -> "Spread":
        """The same in other units, such as milliseconds for seconds."""
        return Spread(self.median * factor, self.lower * factor, self.upper * factor, self.runs)

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


class ColdCaches:
    """A call rewrites 128 MB, so that what runs next reads its weights from memory.

    In a model the body does that between two calls of the head, and as there, MLX does it: on the
    GPU, or in the thread that runs the head next and is then awake.
    """

    def __init__(self):
        self._memory = mx.zeros(CACHES_BYTES // 4)

    def __call__(self) -> None:
        self._memory = self._memory + 1
        mx.eval(self._memory)


def turns(items: Iterable[Item], rounds: int) -> Iterator[tuple[int, Item]]:
    """Who runs when: the number of the round, 0 … rounds, and each item in an order drawn anew.

    The orders are the same for the same number of items.
    """
    items, draw = list(items), random.Random(0)
    for number in range(rounds + 1):
        for item in draw.sample(items, len(items)):
            yield number, item


def in_turns(
    runs: Mapping[str, Callable[[int], object]],
    rounds: int,
    *,
    before: Callable[[], None] | None = None,
    progress: bool = True,
    description: str = "Timing",
) -> dict[str, list[float]]:
    """Times functions in turns: one round that is not counted, then ``rounds`` that are.

    Args:
        runs: By name, functions of the round's number, 0 … rounds. What they return is evaluated
            if it holds arrays, and that belongs to the time.
        rounds: Rounds that count.
        before: Called before each run, outside its time.
        progress: Show a bar.
        description: Of the bar.

    Returns:
        By name, the seconds of each counted round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    bar = tqdm(
        total=(rounds + 1) * len(runs), desc=description, unit="run", leave=False,
        disable=not progress,
    )  # fmt: skip
    with bar:
        for number, name in turns(runs, rounds):
            if before is not None:
                before()
            start = time.perf_counter()
            mx.eval(runs[name](number))
            taken = time.perf_counter() - start
            if number:
                seconds[name].append(taken)
            bar.update()
    return seconds


def head_seconds(heads: tuple[Callable, ...], states: mx.array) -> tuple[list[float], ...]:
    """Times heads, from one hidden state to full logits.

    Args:
        heads: Hidden states (1, 1, D) → logits (1, 1, V).
        states: (L, D).

    Returns:
        For each head the seconds of each state, some times over; the heads take turns.
    """
    runs = {
        str(number): lambda i, head=head: head(states[None, i % len(states), None])
        for number, head in enumerate(heads)
    }
    return tuple(in_turns(runs, HEAD_ROUNDS * len(states), progress=False).values())


def machine() -> dict:
    """What the figures were taken on, JSON-ready: processor, memory, versions, BLAS, threads."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": _cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": "cpu" if mx.default_device().type == mx.cpu else "gpu",
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "blas": _blas(),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
    }
    if mx.metal.is_available():
        found["gpu"] = {key: str(value) for key, value in mx.device_info().items()}
        found["peak_bandwidth_gb_s"] = PEAK_GB_S.get(_chip(found["processor"]))
        found["read_bandwidth_gb_s"] = read_bandwidth_gb_s()
    return found


def read_bandwidth_gb_s(rounds: int = 5) -> float:
    """Memory read by one reduction over 512 MB on the default device, in GB/s: the best run."""
    memory = mx.ones((512 << 20) // 4)
    mx.eval(memory)
    (seconds,) = in_turns({"read": lambda _: mx.max(memory)}, rounds, progress=False).values()
    return memory.nbytes / min(seconds) / 1e9


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


def _chip(processor: str) -> str:
    """ "Apple M3 Max" → "m3-max"."""
    return processor.lower().removeprefix("apple ").replace(" ", "-")


def _sysctl(name: str) -> str:
    result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _blas() -> str:
    """The BLAS that MLX's CPU products run on, with its threads where it tells them."""
    if sys.platform == "darwin":
        return "Accelerate"
    process = ctypes.CDLL(None)  # what is preloaded is found here
    if not hasattr(process, "openblas_get_config"):
        return "the reference BLAS of the mlx wheel"
    process.openblas_get_config.restype = ctypes.c_char_p
    threads = process.openblas_get_num_threads()
    name = " ".join(process.openblas_get_config().decode().split()[:2])
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"
