"""A head of random weights in the shape of a real one, which takes as long."""

import mlx.core as mx
import numpy as np

from ..head.clustered import Centroids
from ..head.flash_head import FlashHead
from ..head.formats import USUAL_GROUP, affine_group
from ..head.matrix import Matrix

CLUSTER_SIZE = 16
USUAL_PROBES = 256


def random_head(
    vocab_size: int,
    hidden_size: int,
    *,
    n_probes: int | None = None,
    dtype: mx.Dtype = mx.float32,
    bits: int = 16,
    seed: int = 0,
) -> FlashHead:
    """Random rows in random clusters of 16, with centroids of 4 bits where the width allows it.

    Rows of 4 or 8 ``bits`` are quantized, 16 leaves them in ``dtype``.

    Raises:
        ValueError: If the rows cannot be quantized, or ``n_probes`` is too large.
    """
    n_clusters = -(-vocab_size // CLUSTER_SIZE)
    if n_probes is None:
        n_probes = min(USUAL_PROBES, n_clusters)
    if not 1 <= n_probes <= n_clusters:
        raise ValueError(f"{n_probes} clusters cannot be scored: choose 1 to {n_clusters}.")
    if bits != 16 and hidden_size % USUAL_GROUP:
        raise ValueError(
            f"A width of {hidden_size} cannot be quantized: leave the rows in 16 bits."
        )
    mx.random.seed(seed)
    rows = Matrix(mx.random.normal((vocab_size, hidden_size), scale=0.05).astype(dtype))
    if bits != 16:
        rows = rows.quantize(bits=bits, group_size=USUAL_GROUP)
    matrix = Matrix(mx.random.normal((n_clusters, hidden_size), scale=0.05))
    group_size = affine_group(hidden_size)
    if group_size is not None:
        matrix = matrix.map(lambda weight: weight.astype(mx.float16))
        matrix = matrix.quantize(bits=4, group_size=group_size)
    centroids = Centroids(matrix, mx.zeros(n_clusters), mx.full((n_clusters,), -2.0))
    slots = np.full(n_clusters * CLUSTER_SIZE, vocab_size, np.uint32)
    slots[:vocab_size] = np.random.default_rng(seed).permutation(vocab_size)
    head = FlashHead(rows, slots.reshape(n_clusters, -1), centroids, n_probes=n_probes)
    mx.eval(head.arrays())
    head.check_kernels(dtype)
    return head
