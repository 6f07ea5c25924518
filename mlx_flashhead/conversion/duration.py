"""The expected time of building an index on this machine."""

import time

import numpy as np

from ..head.matrix import Matrix
from .clustering import PASSES, QUICK_PASSES
from .options import NO_CALIBRATION, IndexOptions

# Passes over all centroids for each dense pass of the clustering, and over all rows for each
# position, that take as long as clustering, fitting and measuring.
CLUSTER_PASSES, POSITION_PASSES = 0.5, 6
SAMPLE = 1024  # rows and columns of the product that measures the machine's speed


def expected_seconds(rows: Matrix, options: IndexOptions) -> float:
    """The approximate greatest time of an index: the time limit of the text, and the products."""
    n_clusters = -(-rows.n_rows // options.cluster_size)
    n_passes = QUICK_PASSES if options.quick else PASSES
    reads = options.source != NO_CALIBRATION
    passes = CLUSTER_PASSES * n_passes * n_clusters + reads * POSITION_PASSES * options.positions
    products = 2.0 * rows.n_rows * rows.hidden_size * passes / _operations_per_second()
    return reads * options.calibration_seconds + products


def in_words(seconds: float) -> str:
    """A duration in words: "a minute" or "7 minutes", rounded up."""
    minutes = max(1, -(-round(seconds) // 60))
    return "a minute" if minutes == 1 else f"{minutes} minutes"


def _operations_per_second() -> float:
    """Speed of a product of floats by numpy, which does nearly all of the work."""
    matrix = np.ones((SAMPLE, SAMPLE), dtype=np.float32)
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2.0 * SAMPLE**3 / best
