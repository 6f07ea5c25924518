"""Clusters of a head's rows, and their centroids.

Balanced k-means: each row keeps a shortlist of its best centroids, prices make crowded ones dearer,
and a fill with hard capacities places every row.

Centroids predict the logsumexp of their clusters' logits, by ridge regression on states h. They are
rounded to 4 bits with the errors fed forward (GPTQ). The remaining residual, of mean m_c and
variance s2_c over the states, gives the bias:

    S_c = h · mu_c + m_c + s2_c / 2     the log of the cluster's expected mass, if it is normal
    S_c - ln n_c                        the logit of each of the n_c tokens of other clusters
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..head.clustered import Centroids
from ..head.matrix import DEFAULT_GROUP, Matrix, affine_group, as_float32
from . import Step, Steps

LIST_LENGTH = 24  # centroids in a row's shortlist
BUCKETS = 256  # at least, where there are so many; a shortlist holds one centroid of each at most
BLOCK_ROWS, BLOCK_SCORES = 2048, 1 << 22  # rows and scores at once, which bounds memory
PASSES, QUICK_PASSES = 6, 2  # dense passes over all rows
PRICE_STEPS = (40, 20)  # price updates in the first iteration and in each later one

# Rows are duplicates if their squared distance is at most this share of that to the mean of all
# rows. They are searched around a sample.
DUPLICATE_DISTANCE, DUPLICATE_SAMPLE = 0.2, 1024

BLOCK_STATES, BLOCK_CLUSTERS = 2048, 64  # at once, which bounds memory
FLOOR = 0.1  # of the variance in all directions, of its mean; 0.03 to 0.3 make no difference
COLUMNS_SHARE, LEAST_COLUMNS = 1 / 6, 64  # of D; a third or all of them make no difference
RIDGE = 0.03  # penalty, relative to the states' mean variance per dimension
BITS, LEVELS = 4, 15  # of a rounded centroid
DAMPING = 0.01  # share of the mean variance added to the covariance before it is inverted

Array = np.ndarray
Count = Callable[..., Step]  # takes the rows that a part of the work has done


def cluster_rows(
    rows: Array,
    cluster_size: int = 16,
    *,
    seed: int = 0,
    metric: Array | None = None,
    passes: int = PASSES,
) -> Steps[Array]:
    """Groups the rows (V, D) float32 of a head into clusters of equal size.

    ``metric`` (D, d) float32 multiplies the rows first; None: only their directions count. Returns
    (C, cluster_size) uint32, C = ceil(V / cluster_size): each of 0 … V-1 once, ascending within a
    cluster; V marks padded slots at a cluster's end. The same seed gives the same on a device.
    ValueError if a row is not finite.

    Source: FlashHead, arXiv 2603.14591, clusters its rows by balanced spherical k-means. The way to
        the balance and the metric are this project's own.
    """
    if not np.isfinite(rows).all():
        raise ValueError("The rows hold NaN or infinity: check the model's output weights.")
    rng, vocab_size = np.random.default_rng(seed), len(rows)
    hidden_size = (rows if metric is None else metric).shape[1]
    done, total = 0, passes * vocab_size

    def progress(n_rows: int = 0) -> Step:
        nonlocal done
        done = min(done + n_rows, total)
        return Step("Clustering", done, total, "row")

    # the only copy of the rows: less their mean, for exact distances, and a column of ones
    points = np.ones((vocab_size, hidden_size + 1), dtype=np.float32)
    mapped = points[:, :hidden_size]
    for start in range(0, vocab_size, BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        if metric is None:
            norms = np.sqrt(_squares(block))
            block = block / np.where(norms > 0, norms, 1)[:, None]
        mapped[start : start + len(block)] = block if metric is None else block @ metric
        yield progress()
    mapped -= mapped.mean(axis=0, dtype=np.float64).astype(np.float32)
    grouped, others = yield from _group_duplicates(mapped, cluster_size, rng, progress)
    n_clusters = -(-len(others) // cluster_size)
    token_ids = np.full((len(grouped) + n_clusters, cluster_size), vocab_size, dtype=np.uint32)
    token_ids[: len(grouped)] = grouped
    if n_clusters:
        for start in range(0, len(others), BLOCK_ROWS):  # to the front, without a second copy
            block = points[others[start : start + BLOCK_ROWS]]
            points[start : start + len(block)] = block
        capacity = len(others) // n_clusters + (np.arange(n_clusters) < len(others) % n_clusters)
        members = yield from _balanced_kmeans(
            points[: len(others)], capacity, passes, rng, progress
        )
        for column, ids in enumerate(members):
            token_ids[len(grouped) : len(grouped) + len(ids), column] = others[ids]
    return np.sort(token_ids, axis=1)


def _squares(vectors: Array) -> Array:
    """Squared norms, (R, D) → (R,), without a temporary copy of the vectors."""
    return np.einsum("rd,rd->r", vectors, vectors)


def _group_duplicates(
    points: Array, cluster_size: int, rng: np.random.Generator, progress: Count
) -> Steps[tuple[Array, Array]]:
    """Ids (G, cluster_size) of large sets of nearly identical rows, such as those of unused tokens,
    which would crowd the same few shortlists; and the ascending ids of all others."""
    sample = rng.permutation(len(points))[:DUPLICATE_SAMPLE]
    smallest = LIST_LENGTH * cluster_size
    n_near = np.zeros(len(sample), dtype=np.int64)
    for start in range(0, len(points), BLOCK_ROWS):
        n_near += _near(points[start : start + BLOCK_ROWS], points[sample]).sum(axis=0)
        yield progress()
    groups = [np.empty((0, cluster_size), dtype=np.int64)]
    left = np.ones(len(points), dtype=bool)
    for i in np.argsort(-n_near, kind="stable"):
        if n_near[i] > smallest and left[sample[i]]:
            near = np.flatnonzero(left & _near(points, points[sample[i], None])[:, 0])
            if len(near) > smallest:
                near = near[: len(near) // cluster_size * cluster_size]
                groups.append(near.reshape(-1, cluster_size))
                left[near] = False
    return np.concatenate(groups), np.flatnonzero(left)


def _near(points: Array, centres: Array) -> Array:
    """Whether points (R, D) are duplicates of centres (M, D): (R, M) bool. Their mean is zero."""
    own, central = _squares(points), _squares(centres)
    # |x - y|² <= limit, solved for x · y
    return points @ centres.T >= 0.5 * (own[:, None] + (1 - DUPLICATE_DISTANCE) * central)


def _balanced_kmeans(
    points: Array, capacity: Array, passes: int, rng: np.random.Generator, progress: Count
) -> Steps[list[Array]]:
    """Entry j holds the j-th member of each cluster that has more than j: the first ones, since the
    capacity (C,) descends."""
    n_points, n_clusters = len(points), len(capacity)
    members = [rng.permutation(n_points)[:n_clusters]]
    prices = np.zeros(n_clusters, dtype=np.float32)
    every = np.arange(n_points)
    library = mx if mx.default_device().type == mx.gpu else np  # a GPU is faster
    for iteration in range(passes):
        centroids = _centroids(points, members)
        ids, scores = yield from _shortlists(points, every, centroids, library, progress)
        # prices move until demand for each centroid meets its capacity
        step = 0.3 * np.median(scores.max(axis=1) - np.median(scores, axis=1))
        for _ in range(PRICE_STEPS[min(iteration, 1)]):
            best = (scores - prices[ids]).argmax(axis=1)
            wanted = np.bincount(ids[every, best], minlength=n_clusters)
            prices += (step * np.clip(wanted / capacity - 1, -1, 2)).astype(np.float32)
            step *= 0.95
            yield progress()
        free, assigned, waiting = capacity.copy(), np.full(n_points, -1), every
        while len(waiting):
            _place(waiting, ids, scores - prices[ids], free, assigned)
            waiting = np.flatnonzero(assigned < 0)
            if len(waiting):  # their lists are full: they get one of the open clusters
                yield progress()
                opened = np.flatnonzero(free)
                lists = _shortlists(points, waiting, centroids[opened], library, progress)
                listed, scores = yield from lists
                ids = opened[listed]
        order = np.argsort(assigned, kind="stable")
        first = np.cumsum(capacity) - capacity
        members = [order[first[capacity > j] + j] for j in range(capacity[0])]
    return members


def _centroids(points: Array, members: list[Array]) -> Array:
    """(c, -|c|²/2) for the means c: the product with a point grows as the point comes nearer."""
    centroids = points[members[0]]
    for column in members[1:]:
        centroids[: len(column)] += points[column]
    centroids[:, :-1] /= centroids[:, -1:]
    centroids[:, -1] = -0.5 * _squares(centroids[:, :-1])
    return centroids


def _shortlists(
    points: Array, rows: Array, centroids: Array, library: Any, progress: Count
) -> Steps[tuple[Array, Array]]:
    """Ids and scores (R, 24 or C) of the best centroids of the points ``rows`` (R,), unordered: the
    best ones of buckets, found in rounds of pairs, which take less time than the product."""
    xp, n_clusters = library, len(centroids)
    length = min(LIST_LENGTH, n_clusters)
    n_rounds = max(n_clusters // BUCKETS, 1).bit_length() - 1
    n_buckets = -(-n_clusters // 2**n_rounds)
    padding = n_buckets * 2**n_rounds - n_clusters
    columns = (np.pad(centroids, ((0, padding), (0, 0))) if padding else centroids).T
    if xp is not np:  # for numpy it would be another copy
        columns = xp.array(columns)
    ids = np.empty((len(rows), length), dtype=np.int64)
    scores = np.empty((len(rows), length), dtype=np.float32)
    size = max(1, min(BLOCK_ROWS, BLOCK_SCORES // n_clusters))
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        best = xp.array(points[rows[block]]) @ columns
        if padding:
            best[:, n_clusters:] = -np.inf
        rounds = []
        for _ in range(n_rounds):
            rounds.append(best)
            half = best.shape[1] // 2
            best = xp.maximum(best[:, :half], best[:, half:])
        winners = xp.argpartition(best, n_buckets - length, axis=1)[:, n_buckets - length :]
        best = xp.take_along_axis(best, winners, axis=1)
        for products in reversed(rounds):
            lost = xp.take_along_axis(products, winners, axis=1) != best
            winners = winners + lost * (products.shape[1] // 2)
        ids[block], scores[block] = np.asarray(winners), np.asarray(best)
        yield progress(len(best))
    return ids, scores


def _place(waiting: Array, ids: Array, utilities: Array, free: Array, assigned: Array) -> None:
    """Each waiting point (R,) proposes to its best open cluster, which accepts those with most to
    lose, as long as one is open. ``free`` (C,) and ``assigned`` (V,), -1 for none, change."""
    while len(waiting):
        utilities = np.where(free[ids] > 0, utilities, -np.inf)
        rows = np.arange(len(waiting))
        best = utilities.argmax(axis=1)
        most, choice = utilities[rows, best], ids[rows, best]
        utilities[rows, best] = -np.inf
        with np.errstate(invalid="ignore"):  # inf - inf, where no cluster is open
            regret = most - utilities.max(axis=1)
        utilities[rows, best] = most
        can = np.flatnonzero(most > -np.inf)
        order = can[np.lexsort((-regret[can], choice[can]))]
        wanted = np.bincount(choice[order], minlength=len(free))
        place = np.arange(len(order)) - (np.cumsum(wanted) - wanted)[choice[order]]
        accepted = order[place < free[choice[order]]]
        assigned[waiting[accepted]] = choice[accepted]
        free -= np.minimum(wanted, free)
        left = can[assigned[waiting[can]] < 0]
        waiting, ids, utilities = waiting[left], ids[left], utilities[left]


def covariance(states: Array) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of states (N, D), in float64."""
    mean = states.mean(axis=0, dtype=np.float64)
    total = np.zeros((states.shape[1], states.shape[1]))
    for start in range(0, len(states), BLOCK_STATES):
        centred = (states[start : start + BLOCK_STATES] - mean).astype(np.float32)
        total += centred.T @ centred
    return mean, total / len(states)


def logit_metric(states: Array) -> Array:
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


def raw_means(rows: Array, token_ids: Array) -> Array:
    """Mean of each cluster's rows, (C, D) float32, without the padded slots."""
    sums = np.zeros((len(token_ids), rows.shape[1]), dtype=np.float32)
    real = token_ids < len(rows)
    for column in range(token_ids.shape[1]):
        held = real[:, column]
        sums[held] += rows[token_ids[held, column]]
    return sums / real.sum(axis=1, keepdims=True, dtype=np.float32)


def fit_centroids(
    rows: Array | mx.array,
    token_ids: Array,
    states: Array | None = None,
    *,
    head_bias: Array | mx.array | None = None,
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

    # max: equal states have no variance, and the means stay
    penalty = RIDGE * max(np.trace(state_variance) / hidden_size, 1e-12)
    penalised = state_variance + penalty * np.eye(hidden_size)
    centroids = means + np.linalg.solve(penalised, cross.T).T
    matrix, rounded = yield from _quantize(centroids, state_variance, group_size)
    change = rounded - means
    variance = variance + np.sum((change @ state_variance - 2 * cross) * change, axis=1)
    bias = (mean - change @ state_mean + np.maximum(variance, 0) / 2).astype(np.float32)
    tail_offset = -np.log((token_ids < vocab_size).sum(axis=1)).astype(np.float32)
    return Centroids(matrix, mx.array(bias), mx.array(tail_offset))


def _quantize(centroids: Array, covariance: Array, group_size: int) -> Steps[tuple[Matrix, Array]]:
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
    shifts = np.arange(0, 32, BITS, dtype=np.uint32)
    words = codes.T.reshape(len(centroids), -1, 32 // BITS) << shifts
    packed = mx.array(np.bitwise_or.reduce(words, axis=-1))
    scaled = (mx.array(scales.T), mx.array(offsets.T))
    return Matrix(packed, *scaled, group_size=group_size, bits=BITS), rounded.T
