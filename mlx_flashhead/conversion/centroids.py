"""Centroids of clusters, and the metric in which their rows are near.

Centroids predict the logsumexp of their clusters' logits, by ridge regression on states h. They are
rounded to 4 bits with the errors fed forward (GPTQ). The remaining residual, of mean m_c and
variance s2_c over the states, gives the bias:

    S_c = h · mu_c + m_c + s2_c / 2     the log of the cluster's expected mass, if it is normal
    S_c - ln n_c                        the logit of each of the n_c tokens of other clusters
"""

from functools import partial

import mlx.core as mx
import numpy as np

from ..head.clustered import Centroids
from ..head.matrix import DEFAULT_GROUP, Matrix, affine_group, as_float32
from . import Progress, Task
from .checkpoint import NOT_KEPT, Checkpoint, checksum

# So many are read at once, which bounds memory.
BLOCK_CLUSTERS = 64
BLOCK_STATES = 2048

# The penalty of the fit, relative to the states' mean variance per dimension.
RIDGE = 0.03
# A rounded centroid has so many bits, and values above its offset.
BITS = 4
LEVELS = 15
# This share of the mean variance is added to the covariance before it is inverted.
DAMPING = 0.01

# The metric's variance in each direction, relative to the mean; 0.03 to 0.3 make no difference.
FLOOR = 0.1
# The metric's columns, as a share of D; a third or all of them make no difference.
COLUMNS_SHARE = 1 / 6
LEAST_COLUMNS = 64

Array = np.ndarray


def logit_metric(states: Array) -> Array:
    """The metric in which rows of a head are near if their logits are.

    Args:
        states: Hidden states h (N, D).

    Returns:
        A matrix L (D, d) float32 that multiplies rows x, so that |(x - y) L|² is the variance of
        h · (x - y) over the states, scaled to a mean of 1. It has the directions of most variance.
    """
    hidden_size = states.shape[1]
    _, variance = covariance(states)
    mean_variance = np.trace(variance) / hidden_size
    if mean_variance > 0:
        variance = variance / mean_variance
    values, directions = np.linalg.eigh(variance)
    n_columns = min(hidden_size, max(LEAST_COLUMNS, round(COLUMNS_SHARE * hidden_size)))
    scales = np.sqrt(np.maximum(values[-n_columns:], 0) + FLOOR)
    return (directions[:, -n_columns:] * scales).astype(np.float32)


def covariance(states: Array) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of states (N, D), in float64."""
    mean = states.mean(axis=0, dtype=np.float64)
    total = np.zeros((states.shape[1], states.shape[1]))
    for start in range(0, len(states), BLOCK_STATES):
        centred = (states[start : start + BLOCK_STATES] - mean).astype(np.float32)
        total += centred.T @ centred
    return mean, total / len(states)


def fit_centroids(
    rows: Array | mx.array,
    token_ids: Array,
    states: Array | None = None,
    *,
    head_bias: Array | mx.array | None = None,
    group_size: int = DEFAULT_GROUP,
    checkpoint: Checkpoint = NOT_KEPT,
) -> Task[Centroids]:
    """Fits the centroids of clusters, rounded to 4 bits with float16 scales.

    Without states they are the plain means, with a tail offset of zero.

    Source: GPTQ is arXiv 2210.17323, algorithm 1; the fit is this project's own.

    Args:
        rows: Of the head (V, D).
        token_ids: The clusters (C, cluster_size), with V in padded slots.
        states: Hidden states (N, D) float32.
        head_bias: The head's bias (V,), if it has one.
        group_size: Columns that share a scale, else 32. If neither divides D the centroids stay
            floats.
        checkpoint: Keeps the residuals.

    Returns:
        The centroids, their bias and their tail offset.
    """
    rows = as_float32(rows)
    vocab_size, hidden_size = rows.shape
    bias_of_tokens = np.zeros(vocab_size, np.float32)
    if head_bias is not None:
        bias_of_tokens = as_float32(head_bias)
    means = mean_rows(rows, token_ids)
    if states is None:
        matrix, _ = yield from _quantize(means, np.eye(hidden_size), group_size)
        mean_bias = mx.array(mean_rows(bias_of_tokens[:, None], token_ids)[:, 0])
        return Centroids(matrix, mean_bias, mx.zeros(len(token_ids)))

    state_mean, state_variance = covariance(states)
    residual_mean, residual_variance, cross = yield from _fit_residuals(
        rows, token_ids, means, states, state_mean, bias_of_tokens, checkpoint
    )
    # Equal states have no variance: the means stay then.
    penalty = RIDGE * max(np.trace(state_variance) / hidden_size, 1e-12)
    penalised = state_variance + penalty * np.eye(hidden_size)
    fitted = means + np.linalg.solve(penalised, cross.T).T
    matrix, rounded = yield from _quantize(fitted, state_variance, group_size)
    change = rounded - means
    moved = np.sum((change @ state_variance - 2 * cross) * change, axis=1)
    variance = np.maximum(residual_variance + moved, 0)
    bias = (residual_mean - change @ state_mean + variance / 2).astype(np.float32)
    tail_offset = -np.log((token_ids < vocab_size).sum(axis=1)).astype(np.float32)
    return Centroids(matrix, mx.array(bias), mx.array(tail_offset))


def mean_rows(rows: Array, token_ids: Array) -> Array:
    """Means of the clusters' rows.

    Args:
        rows: Rows (V, D) float32.
        token_ids: The clusters (C, cluster_size), with V in padded slots, which do not count.

    Returns:
        The means (C, D) float32.
    """
    sums = np.zeros((len(token_ids), rows.shape[1]), dtype=np.float32)
    real = token_ids < len(rows)
    for column in range(token_ids.shape[1]):
        filled = real[:, column]
        sums[filled] += rows[token_ids[filled, column]]
    return sums / real.sum(axis=1, keepdims=True, dtype=np.float32)


def _fit_residuals(
    rows: Array,
    token_ids: Array,
    means: Array,
    states: Array,
    state_mean: Array,
    head_bias: Array,
    checkpoint: Checkpoint,
) -> Task[tuple[Array, Array, Array]]:
    """The residuals r_c = logsumexp_c - h · mean_c of the means (C, D) over the states h (N, D).

    Returns:
        Their mean (C,), their variance (C,), and their covariance with h (C, D), in float64.
    """
    vocab_size, hidden_size = rows.shape
    n_clusters = len(token_ids)
    blocks = [states[i : i + BLOCK_STATES] for i in range(0, len(states), BLOCK_STATES)]
    centred = [(block - state_mean).astype(np.float32) for block in blocks]
    total = np.zeros(n_clusters)
    squares = np.zeros(n_clusters)
    cross = np.zeros((n_clusters, hidden_size))
    # The last value leaves padded slots out.
    slot_bias = np.append(head_bias, -np.inf).astype(np.float32)
    source = checksum(token_ids, states)
    kept = checkpoint.read("residuals", source)
    n_kept = len(kept.get("total", ()))
    if n_kept:
        total[:n_kept] = kept["total"]
        squares[:n_kept] = kept["squares"]
        cross[:n_kept] = kept["cross"]
    # A bar is there before the first part, which may take long.
    yield Progress("Fitting", n_kept, n_clusters, kept=True)
    for start in range(n_kept, n_clusters, BLOCK_CLUSTERS):
        part = slice(start, start + BLOCK_CLUSTERS)
        # (cluster_size, c): sums over a cluster run along axis 0.
        slots = token_ids[part].T
        columns = rows[np.minimum(slots, vocab_size - 1)].reshape(-1, hidden_size).T
        for block, centred_block in zip(blocks, centred, strict=True):
            logits = (block @ columns).reshape(len(block), *slots.shape) + slot_bias[slots]
            best = logits.max(axis=1)
            residuals = np.log(np.exp(logits - best[:, None]).sum(axis=1)) + best
            residuals -= block @ means[part].T
            total[part] += residuals.sum(axis=0, dtype=np.float64)
            squares[part] += np.square(residuals, dtype=np.float64).sum(axis=0)
            cross[part] += residuals.T @ centred_block
            yield Progress("Fitting", 0, n_clusters)
        done = slice(min(start + BLOCK_CLUSTERS, n_clusters))
        arrays = {"total": total[done], "squares": squares[done], "cross": cross[done]}
        checkpoint.offer("residuals", source, partial(dict, arrays))
        yield Progress("Fitting", slots.shape[1], n_clusters)
    mean = total / len(states)
    variance = squares / len(states) - np.square(mean)
    return mean, variance, cross / len(states)


def _quantize(centroids: Array, covariance: Array, group_size: int) -> Task[tuple[Matrix, Array]]:
    """Rounds centroids so that their products with states change least.

    Args:
        centroids: The centroids (C, D).
        covariance: Of the states (D, D), float64.
        group_size: Columns that share a scale.

    Returns:
        The matrix, and its values (C, D) in float64.
    """
    n_clusters, hidden_size = centroids.shape
    group_size = affine_group(hidden_size, group_size) or 0
    if not group_size:
        weight = centroids.astype(np.float16)
        return Matrix(mx.array(weight)), weight.astype(np.float64)
    damping = DAMPING * max(np.trace(covariance) / hidden_size, 1e-12)
    inverse = np.linalg.inv(covariance + damping * np.eye(hidden_size))
    # Upper triangle: the effect of a column's error on later ones.
    feed = np.linalg.cholesky(inverse).T
    # (D, C): the columns of the centroids are contiguous.
    left = centroids.T.astype(np.float64)
    codes = np.empty(left.shape, dtype=np.uint32)
    rounded = np.empty_like(left)
    n_groups = hidden_size // group_size
    scales = np.empty((n_groups, n_clusters), np.float16)
    offsets = np.empty((n_groups, n_clusters), np.float16)
    for number in range(n_groups):
        start = number * group_size
        group = slice(start, start + group_size)
        # The scale spans the range exactly; mx.quantize's keeps zero representable.
        low = left[group].min(axis=0)
        high = left[group].max(axis=0)
        scales[number] = (high - low) / LEVELS
        offsets[number] = low
        scale = scales[number].astype(np.float32)
        offset = offsets[number].astype(np.float32)
        # The scale of a constant group is 0.
        divisor = np.where(scale > 0, scale, 1)
        errors = np.empty((group_size, n_clusters))
        for i in range(start, group.stop):
            codes[i] = np.clip(np.round((left[i] - offset) / divisor), 0, LEVELS)
            rounded[i] = codes[i] * scale + offset
            errors[i - start] = (left[i] - rounded[i]) / feed[i, i]
            later = slice(i + 1, group.stop)
            left[later] -= np.outer(feed[i, later], errors[i - start])
            yield Progress("Rounding", 1, hidden_size)
        left[group.stop :] -= feed[group, group.stop :].T @ errors
    # As in MLX, a word of 32 bits has the first code in its lowest ones.
    shifts = np.arange(0, 32, BITS, dtype=np.uint32)
    words = codes.T.reshape(n_clusters, -1, 32 // BITS) << shifts
    matrix = Matrix(
        mx.array(np.bitwise_or.reduce(words, axis=-1)),
        mx.array(scales.T),
        mx.array(offsets.T),
        group_size=group_size,
        bits=BITS,
    )
    return matrix, rounded.T
