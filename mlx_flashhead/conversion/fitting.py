"""Centroids that predict the logsumexp of their clusters' logits, by ridge regression on states h.

They are rounded to 4 bits with the errors fed forward (GPTQ). The remaining residual, of mean m_c
and variance s2_c over the states, gives the bias:

    S_c = h · mu_c + m_c + s2_c / 2     the log of the cluster's expected mass, if it is normal
    S_c - ln n_c                        the logit of each of the n_c tokens of other clusters
"""

import mlx.core as mx
import numpy as np

from ..head.clustered import Centroids
from ..head.matrix import DEFAULT_GROUP, Matrix, affine_group, as_float32
from . import Step, Steps

BLOCK_STATES, BLOCK_CLUSTERS = 2048, 64  # at once, which bounds memory
# Variance added in all directions, as a share of the mean variance. 0.03 to 0.3 make no difference.
FLOOR = 0.1
COLUMNS_SHARE, LEAST_COLUMNS = 1 / 6, 64  # of D; a third or all of them make no difference
RIDGE = 0.03  # penalty, relative to the states' mean variance per dimension
BITS, LEVELS = 4, 15  # of a rounded centroid
DAMPING = 0.01  # share of the mean variance added to the covariance before it is inverted


def covariance(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of states (N, D), in float64."""
    mean = states.mean(axis=0, dtype=np.float64)
    total = np.zeros((states.shape[1], states.shape[1]))
    for start in range(0, len(states), BLOCK_STATES):
        centred = (states[start : start + BLOCK_STATES] - mean).astype(np.float32)
        total += centred.T @ centred
    return mean, total / len(states)


def logit_metric(states: np.ndarray) -> np.ndarray:
    """The matrix L (D, d) float32 by which rows x are multiplied, so that |(x - y) L|² is the
    variance of h · (x - y) over states h, scaled to a mean of 1. It has the directions of most
    variance."""
    hidden_size = states.shape[1]
    _, variance = covariance(states)
    mean_variance = np.trace(variance) / hidden_size
    if mean_variance > 0:
        variance = variance / mean_variance
    values, directions = np.linalg.eigh(variance)
    n_columns = min(hidden_size, max(LEAST_COLUMNS, round(COLUMNS_SHARE * hidden_size)))
    scales = np.sqrt(np.maximum(values[-n_columns:], 0) + FLOOR)
    return (directions[:, -n_columns:] * scales).astype(np.float32)


def raw_means(rows: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Mean of each cluster's rows, (C, D) float32, without the padded slots."""
    sums = np.zeros((len(token_ids), rows.shape[1]), dtype=np.float32)
    real = token_ids < len(rows)
    for column in range(token_ids.shape[1]):
        held = real[:, column]
        sums[held] += rows[token_ids[held, column]]
    return sums / real.sum(axis=1, keepdims=True, dtype=np.float32)


def fit_centroids(
    rows: np.ndarray | mx.array,
    token_ids: np.ndarray,
    states: np.ndarray | None = None,
    *,
    head_bias: np.ndarray | mx.array | None = None,
    group_size: int = DEFAULT_GROUP,
) -> Steps[Centroids]:
    """Fits centroids to rows (V, D) and states (N, D), rounded to 4 bits with float16 scales.

    Without states they are the plain means, with a tail offset of zero. ``token_ids`` (C,
    cluster_size) hold V in padded slots. ``group_size`` columns share a scale, else 32; if neither
    divides D the centroids stay floats.

    Source: GPTQ is arXiv 2210.17323, algorithm 1; the fit is this project's own.
    """
    rows = as_float32(rows)
    (vocab_size, hidden_size), n_clusters = rows.shape, len(token_ids)
    head_bias = np.zeros(vocab_size, np.float32) if head_bias is None else as_float32(head_bias)
    means = raw_means(rows, token_ids)
    if states is None:
        matrix, _ = yield from _quantize(means, np.eye(hidden_size), group_size)
        bias = raw_means(head_bias[:, None], token_ids)[:, 0]
        return Centroids(matrix, mx.array(bias), mx.zeros(n_clusters))

    # Over the states h, in float64: mean and variance of the residuals r_c = logsumexp_c - h·mean_c
    # (C,), and their covariance with h (C, D).
    state_mean, state_variance = covariance(states)
    blocks = [states[i : i + BLOCK_STATES] for i in range(0, len(states), BLOCK_STATES)]
    centred = [(block - state_mean).astype(np.float32) for block in blocks]
    total, squares = np.zeros((2, n_clusters))
    cross = np.zeros((n_clusters, hidden_size))
    slot_bias = np.append(head_bias, -np.inf).astype(np.float32)  # leaves padded slots out
    for start in range(0, n_clusters, BLOCK_CLUSTERS):
        part = slice(start, start + BLOCK_CLUSTERS)
        slots = token_ids[part].T  # (cluster_size, c): sums over a cluster run along axis 0
        columns = rows[np.minimum(slots, vocab_size - 1)].reshape(-1, hidden_size).T
        for block, centred_block in zip(blocks, centred, strict=True):
            logits = (block @ columns).reshape(len(block), *slots.shape) + slot_bias[slots]
            best = logits.max(axis=1)
            residuals = np.log(np.exp(logits - best[:, None]).sum(axis=1)) + best
            residuals -= block @ means[part].T
            total[part] += residuals.sum(axis=0, dtype=np.float64)
            squares[part] += np.square(residuals, dtype=np.float64).sum(axis=0)
            cross[part] += residuals.T @ centred_block
            yield Step("Fitting", min(start + BLOCK_CLUSTERS, n_clusters), n_clusters, "cluster")
    mean = total / len(states)
    variance = squares / len(states) - np.square(mean)
    cross /= len(states)

    # max: equal states have no variance, and the means are kept
    penalty = RIDGE * max(np.trace(state_variance) / hidden_size, 1e-12)
    penalised = state_variance + penalty * np.eye(hidden_size)
    centroids = means + np.linalg.solve(penalised, cross.T).T
    matrix, rounded = yield from _quantize(centroids, state_variance, group_size)
    change = rounded - means
    variance = variance + np.sum((change @ state_variance - 2 * cross) * change, axis=1)
    bias = (mean - change @ state_mean + np.maximum(variance, 0) / 2).astype(np.float32)
    tail_offset = -np.log((token_ids < vocab_size).sum(axis=1)).astype(np.float32)
    return Centroids(matrix, mx.array(bias), mx.array(tail_offset))


def _quantize(
    centroids: np.ndarray, covariance: np.ndarray, group_size: int
) -> Steps[tuple[Matrix, np.ndarray]]:
    """Rounds centroids (C, D) so that their products with states of this covariance change least:
    the matrix, and its values (C, D) in float64."""
    hidden_size = centroids.shape[1]
    group_size = affine_group(hidden_size, group_size) or 0
    if not group_size:
        weight = centroids.astype(np.float16)
        return Matrix(mx.array(weight)), weight.astype(np.float64)
    damping = DAMPING * max(np.trace(covariance) / hidden_size, 1e-12)
    inverse = np.linalg.inv(covariance + damping * np.eye(hidden_size))
    feed = np.linalg.cholesky(inverse).T  # upper: the effect of a column's error on later ones
    left = centroids.T.astype(np.float64)  # (D, C): the columns of the centroids are contiguous
    codes = np.empty(left.shape, dtype=np.uint32)
    rounded = np.empty_like(left)
    scales, offsets = np.empty((2, hidden_size // group_size, len(centroids)), np.float16)
    for number, start in enumerate(range(0, hidden_size, group_size)):
        group = slice(start, start + group_size)
        # the scale spans the range exactly; mx.quantize's keeps zero representable
        low, high = left[group].min(axis=0), left[group].max(axis=0)
        scales[number], offsets[number] = (high - low) / LEVELS, low
        scale, offset = scales[number].astype(np.float32), offsets[number].astype(np.float32)
        step = np.where(scale > 0, scale, 1)  # the scale of a constant group is 0
        errors = np.empty((group_size, left.shape[1]))
        for i in range(start, group.stop):
            codes[i] = np.clip(np.round((left[i] - offset) / step), 0, LEVELS)
            rounded[i] = codes[i] * scale + offset
            errors[i - start] = (left[i] - rounded[i]) / feed[i, i]
            later = slice(i + 1, group.stop)
            left[later] -= np.outer(feed[i, later], errors[i - start])
            yield Step("Rounding", i + 1, hidden_size, "column")
        left[group.stop :] -= feed[group, group.stop :].T @ errors
    # MLX packs the codes of a row into words of 32 bits, the first in the lowest bits
    words = codes.T.reshape(len(centroids), -1, 32 // BITS) << np.arange(0, 32, BITS, np.uint32)
    packed = mx.array(np.bitwise_or.reduce(words, axis=-1))
    scaled = {"scales": mx.array(scales.T), "biases": mx.array(offsets.T)}
    return Matrix(packed, **scaled, group_size=group_size, bits=BITS), rounded.T
