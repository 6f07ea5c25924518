"""A conversion: the time of each stage, and the peak of memory."""

import importlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..conversion.indexing import build_index
from ..conversion.mix import HELD_OUT_SHARE
from ..conversion.pipeline import convert
from ..conversion.positions import Positions
from ..head.matrix import Matrix

# The functions of each stage, by the module that calls them.
INDEX_STAGES = (
    ("given text", "conversion.mix", "read_windows"),
    ("written text", "conversion.mix", "written_positions"),
    ("given text", "conversion.pipeline", "text_states"),
    ("clustering", "conversion.indexing", "cluster_rows"),
    ("centroids", "conversion.indexing", "fit_centroids"),
    ("report", "conversion.indexing", "measure_positions"),
)
STAGES = (
    ("loading", "conversion.pipeline", "load_dense"),
    ("bits", "conversion.pipeline", "set_bits"),
    *INDEX_STAGES,
    ("writing", "conversion.pipeline", "save"),
    ("writing", "conversion.pipeline", "write_index"),
)
TOTAL, OTHER = "total", "other"


@contextmanager
def stage_times(
    stages: tuple[tuple[str, str, str], ...] = STAGES,
) -> Iterator[dict[str, float]]:
    """Within the block, adds up the seconds of each stage, and of all else at its end."""
    seconds: dict[str, float] = {}

    def timed(stage, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

        return call

    package = __package__.rpartition(".")[0]
    with ExitStack() as stack:
        for stage, module_name, name in stages:
            module = importlib.import_module(f"{package}.{module_name}")
            function = getattr(module, name)
            stack.callback(setattr, module, name, function)
            setattr(module, name, timed(stage, function))
        start = time.perf_counter()
        yield seconds
        total = time.perf_counter() - start
    seconds[OTHER] = total - sum(seconds.values())
    seconds[TOTAL] = total


def convert_benchmark(model: str, *, progress: bool = True, **kwargs: Any) -> dict:
    """Converts ``model`` into a temporary folder.

    Args:
        model: A folder or repository, as for ``convert``.
        progress: Show the conversion's bars.
        **kwargs: Further arguments of ``convert``.

    Returns:
        Seconds by stage and the peak of memory, JSON-ready.
    """
    with tempfile.TemporaryDirectory() as folder, stage_times() as seconds:
        config = convert(model, str(Path(folder) / "model"), progress=progress, **kwargs)
    return {
        "model": Path(model).name,
        "n_clusters": config.n_clusters,
        "cluster_size": config.cluster_size,
        "n_probes": config.n_probes,
        "calibration": config.calibration,
        "report": config.report,
    } | _cost(seconds)


def index_benchmark(
    vocab_size: int, hidden_size: int, positions: int, *, seed: int = 0, progress: bool = True
) -> dict:
    """Builds the index of a random head on random states: a conversion without a model.

    Random rows have no clusters, which is the hardest case for the clustering.

    Args:
        vocab_size: Rows V.
        hidden_size: Width D.
        positions: Calibration states.
        seed: Of rows, states and clustering.
        progress: Show bars.

    Returns:
        Seconds by stage and the peak of memory, JSON-ready.
    """
    rng = np.random.default_rng(seed)
    weight = mx.array(rng.standard_normal((vocab_size, hidden_size), dtype=np.float32))
    states = rng.standard_normal((positions, hidden_size), dtype=np.float32)
    next_ids = rng.integers(vocab_size, size=positions)
    rows = Matrix(weight)
    calibrated = Positions.of_one_kind("random", states, next_ids, HELD_OUT_SHARE)
    mx.eval(weight)
    with stage_times() as seconds:
        build_index(rows, calibrated, seed=seed, progress=progress)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "positions": positions,
        "head_mb": weight.nbytes / 1e6,
    } | _cost(seconds)


def _cost(seconds: dict[str, float]) -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, but bytes on macOS
    return {
        "seconds": seconds,
        "peak_memory_mb": peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024),
    }
