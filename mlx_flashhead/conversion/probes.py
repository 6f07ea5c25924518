"""How many clusters to score per token."""

import mlx.core as mx
import numpy as np

from ..head.centroids import Centroids
from ..head.matrix import as_float32

BLOCK_LOGITS = 1 << 24


CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %


PROBES_MULTIPLE = 8  # n_probes is rounded up to a multiple of it


def probes_needed(
    centroids: Centroids,
    rows: np.ndarray | mx.array,
    token_ids: np.ndarray,
    states: np.ndarray | mx.array,
    head_bias: np.ndarray | mx.array | None = None,
) -> np.ndarray:
    """How many probes each position needs to find the dense head's best token.

    That is the place of this token's cluster in the order of the scores, equal scores in the order
    of the clusters. The share of positions that need at most p is the agreement at p probes.

    Args:
        centroids: Of C clusters.
        rows: (V, D), any float dtype.
        token_ids: (C, cluster_size) integers, V in padded slots.
        states: (N, D) hidden states, any float dtype; not those the centroids were fitted on.
        head_bias: (V,) added to the logits.

    Returns:
        (N,) integers, 1 … C.
    """
    rows, states = as_float32(rows), as_float32(states)
    head_bias = 0 if head_bias is None else as_float32(head_bias)
    matrix, bias = as_float32(centroids.matrix.dequantized(mx.float32)), as_float32(centroids.bias)
    n_clusters, cluster_size = token_ids.shape
    clusters = np.arange(n_clusters)
    cluster_of = np.empty(len(rows) + 1, dtype=np.int64)  # and one entry for padded slots
    cluster_of[token_ids.ravel()] = np.repeat(clusters, cluster_size)
    needed = np.empty(len(states), dtype=np.int64)
    size = max(1, BLOCK_LOGITS // len(rows))
    for start in range(0, len(states), size):
        block = states[start : start + size]
        winners = (block @ rows.T + head_bias).argmax(axis=1)
        own = cluster_of[winners][:, None]
        scores = block @ matrix.T + bias
        own_score = np.take_along_axis(scores, own, axis=1)
        ahead = (scores > own_score) | ((scores == own_score) & (clusters < own))
        needed[start : start + size] = 1 + ahead.sum(axis=1)
    return needed


def choose_probes(needed: np.ndarray, n_clusters: int, target: float = 0.99) -> int:
    """The fewest probes that reach a target agreement, rounded up to a multiple of 8.

    It must be reached by the lower end of Wilson's interval around the share of the positions, with
    95 % confidence, since few positions may reach it by luck: with 300 of them SmolLM2-135M would
    get 48 to 64 probes of the 88 to 104 that 1,800 ask for.

    Args:
        needed: (N,) from :func:`probes_needed`.
        n_clusters: C, which is never exceeded.
        target: Agreement, above 0 and at most 1. Where no agreement on so few positions would do,
            all of them must agree.

    Raises:
        ValueError: If ``target`` is not such a share, or there are no positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    if not 0 < target <= 1:
        raise ValueError(f"The target agreement is {target}, but must be above 0 and at most 1.")
    n = len(needed)
    if not n:
        raise ValueError("There are no held-out positions to choose n_probes by: give it instead.")
    agree = np.arange(n + 1) / n
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * agree * (1 - agree) + square**2 / 4)
    lower = (agree + square / 2 - error) / (1 + square)
    enough = np.flatnonzero(lower >= target)
    rank = max(int(enough[0]), 1) if len(enough) else n
    fewest = int(np.sort(needed)[rank - 1])
    return min(-(-fewest // PROBES_MULTIPLE) * PROBES_MULTIPLE, n_clusters)
