"""Heads for the kernels' tests: random ones, and what they must compute, in numpy."""

import contextlib
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_flashhead.head import backend, metal_operations
from mlx_flashhead.head import kernels as kernel_texts
from mlx_flashhead.head.clustered import Centroids, ClusteredRows
from mlx_flashhead.head.matrix import Matrix
from tiny_models import random_clusters

KERNEL_FILES = Path(kernel_texts.__file__).parents[2] / "metal" / "flash_head"
# Half a unit in the last place, relative.
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
# Error of a float32 sum, relative to the sum of its terms' magnitudes. A lane adds D/32 terms one
# after the other, and the simdgroup 32 sums, so that this is enough for D up to 2,560.
SUMMATION = 2e-6


def on_gpu() -> bool:
    """Whether the tests of this run use a real GPU."""
    return mx.metal.is_available()


@contextlib.contextmanager
def kernels(**options):
    """Within the block kernels run: on the GPU, which yields None, else on the emulator."""
    # MLX rounds otherwise.
    always = mock.patch.object(metal_operations, "MATRIX_FROM", 1000)
    if on_gpu():
        with always:
            yield None
        return
    from metal_emulator import Emulator

    as_on_a_gpu = mock.patch.object(backend, "gpu_is_default", lambda: True)
    with Emulator(**options).installed() as emulator, as_on_a_gpu, always:
        yield emulator


@contextlib.contextmanager
def changed_kernels(right: str, wrong: str):
    """Within the block the kernels' files have a text in the place of one that they have once."""
    files = {file.stem: file.read_text() for file in KERNEL_FILES.glob("*.h")}
    assert sum(text.count(right) for text in files.values()) == 1, right
    changed = {name: text.replace(right, wrong) for name, text in files.items()}
    with mock.patch.object(kernel_texts, "part", changed.__getitem__):
        kernel_texts.header.cache_clear()
        try:
            yield
        finally:
            kernel_texts.header.cache_clear()


def to_numpy(array: mx.array) -> np.ndarray:
    """The array as numpy; 16-bit floats as float32, exactly."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.array(array)


def make_rows(rng, n_rows, hidden_size, *, bits, group_size, mode="affine", dtype, scale=0.05):
    """A random Matrix in token order; ``bits`` of 16 or 32 are not quantized."""
    rows = Matrix(mx.array(rng.normal(scale=scale, size=(n_rows, hidden_size))).astype(dtype))
    if bits >= 16:
        return rows
    return rows.quantize(group_size=group_size, bits=bits, mode=mode)


def make_centroids(rng, n_clusters, hidden_size, *, group_size):
    """Random centroids, 4-bit in groups of ``group_size``; 0 for floats."""
    bits = 4 if group_size else 16
    stored = make_rows(
        rng,
        n_clusters,
        hidden_size,
        bits=bits,
        group_size=group_size,
        dtype=mx.bfloat16,
    )
    bias, tail_offset = rng.normal(size=(2, n_clusters)).astype(np.float32)
    return Centroids(stored, mx.array(bias), mx.array(tail_offset - 2))


def cluster(rng, rows: Matrix, centroids: Centroids, cluster_size) -> ClusteredRows:
    """The rows in random clusters."""
    token_ids = random_clusters(rng, rows.n_rows, cluster_size)
    return ClusteredRows.build(rows, token_ids, centroids)


def make_clustered(
    rng, n_clusters, cluster_size, hidden_size, *, padded=0, centroid_group=64, **form
) -> ClusteredRows:
    """Random rows in random clusters with random centroids; 4-bit bfloat16 without a ``form``."""
    form = {"bits": 4, "group_size": 64, "dtype": mx.bfloat16} | form
    rows = make_rows(rng, n_clusters * cluster_size - padded, hidden_size, **form)
    centroids = make_centroids(rng, n_clusters, hidden_size, group_size=centroid_group)
    return cluster(rng, rows, centroids, cluster_size)


def plain_clusters(rng, n_clusters, cluster_size=1) -> ClusteredRows:
    """Clusters of which only the token ids matter; two slots are padded if there is room."""
    padded = 2 if cluster_size > 1 else 0
    return make_clustered(
        rng,
        n_clusters,
        cluster_size,
        4,
        padded=padded,
        centroid_group=0,
        bits=16,
        group_size=0,
        dtype=mx.float16,
    )


def dequantized(stored) -> tuple[np.ndarray, np.ndarray]:
    """Rows in float64 and a bound on the magnitudes that are added up for each weight."""
    weight = to_numpy(stored.dequantized(mx.float32)).astype(np.float64)
    if stored.biases is None:
        return weight, np.abs(weight)
    biases = np.repeat(to_numpy(stored.biases).astype(np.float64), stored.group_size, axis=-1)
    return weight, np.abs(weight - biases) + np.abs(biases)


def products(stored, hidden: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """float64 (R, ...) products with all rows (..., D), and the error float32 sums may have."""
    weight, magnitude = dequantized(stored)
    x = to_numpy(hidden).astype(np.float64)
    return (
        np.tensordot(x, weight, axes=(1, -1)),
        SUMMATION * np.tensordot(np.abs(x), magnitude, axes=(1, -1)),
    )
