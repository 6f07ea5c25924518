"""Balanced k-means over the rows of a head. Each row keeps a shortlist of its best centroids,
prices make crowded ones dearer, and a fill with hard capacities places every row."""

import timeit
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..head.matrix import as_float32
from . import Result, Step, Steps

LIST_LENGTH = 24  # centroids in a row's shortlist
BUCKETS = 256  # at least, where there are so many; a shortlist holds one centroid of each at most
BLOCK_ROWS, BLOCK_SCORES = 2048, 1 << 22  # rows and scores at once, which bounds memory
PASSES, QUICK_PASSES = 6, 2  # dense passes over all rows
PRICE_STEPS = (40, 20)  # price updates in the first iteration and in each later one

# Near-duplicates are rows whose squared distance is at most this share of their squared distance
# to the mean of all rows. They are searched around a sample.
DUPLICATE_DISTANCE = 0.2
DUPLICATE_SAMPLE = 1024
ROUNDING = 1e-5  # of a squared distance, relative to the squared norm

Array = np.ndarray
Counts = Generator[int, None, Result]  # yields the rows that a part of the work has done


def cluster_rows(
    rows: np.ndarray | mx.array,
    cluster_size: int = 16,
    *,
    seed: int = 0,
    metric: np.ndarray | None = None,
    passes: int = PASSES,
) -> Steps[np.ndarray]:
    """Groups the rows (V, D) of a head into clusters of equal size; ValueError if one is not
    finite.

    ``metric`` (D, d) float32 multiplies the rows first; None: only their directions count. Returns
    (C, cluster_size) uint32, C = ceil(V / cluster_size): each of 0 … V-1 once, ascending within a
    cluster; V marks padded slots at a cluster's end. The same seed gives the same on a device.

    Source: FlashHead, arXiv 2603.14591, clusters its rows by balanced spherical k-means. The way to
        the balance and the metric are this project's own.
    """
    rows = as_float32(rows)
    if not np.isfinite(rows).all():
        raise ValueError("The rows hold NaN or infinity: check the model's output weights.")
    counts = _clusters(rows, cluster_size, metric, passes, np.random.default_rng(seed))
    done, total = 0, len(rows) * passes
    while True:
        try:
            done = min(done + next(counts), total)
        except StopIteration as end:
            return end.value
        yield Step("Clustering", done, total, "row")


def _clusters(
    rows: Array, cluster_size: int, metric: Array | None, passes: int, rng: np.random.Generator
) -> Counts[Array]:
    vocab_size, hidden_size = len(rows), (rows if metric is None else metric).shape[1]
    # the only copy of the rows: less their mean, for exact distances, and a column of ones
    points = np.ones((vocab_size, hidden_size + 1), dtype=np.float32)
    mapped = points[:, :hidden_size]
    for start in range(0, vocab_size, BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        if metric is None:
            norms = np.sqrt(_squares(block))
            block = block / np.where(norms > 0, norms, 1)[:, None]
        mapped[start : start + len(block)] = block if metric is None else block @ metric
        yield 0
    mapped -= mapped.mean(axis=0, dtype=np.float64).astype(np.float32)
    grouped, others = yield from _group_duplicates(mapped, cluster_size, rng)
    yield passes * grouped.size
    n_clusters = -(-len(others) // cluster_size)
    token_ids = np.full((len(grouped) + n_clusters, cluster_size), vocab_size, dtype=np.uint32)
    token_ids[: len(grouped)] = grouped
    if n_clusters:
        for start in range(0, len(others), BLOCK_ROWS):  # to the front, without a second copy
            block = points[others[start : start + BLOCK_ROWS]]
            points[start : start + len(block)] = block
        points = points[: len(others)]
        capacity = len(others) // n_clusters + (np.arange(n_clusters) < len(others) % n_clusters)
        members = yield from _balanced_kmeans(points, capacity, passes, rng)
        for column, ids in enumerate(members):
            token_ids[len(grouped) : len(grouped) + len(ids), column] = others[ids]
    return np.sort(token_ids, axis=1)


def _squares(vectors: Array) -> Array:
    """Squared norms, (R, D) → (R,), without a temporary copy of the vectors."""
    return np.einsum("rd,rd->r", vectors, vectors)


def _group_duplicates(
    points: Array, cluster_size: int, rng: np.random.Generator
) -> Counts[tuple[Array, Array]]:
    """Ids (G, cluster_size) of large sets of nearly identical rows, such as those of unused tokens,
    which would crowd the same few shortlists; and the ascending ids of all others."""
    sample = rng.permutation(len(points))[:DUPLICATE_SAMPLE]
    smallest = LIST_LENGTH * cluster_size
    middle = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    n_near = np.zeros(len(sample), dtype=np.int64)
    for start in range(0, len(points), BLOCK_ROWS):
        n_near += _near(points[start : start + BLOCK_ROWS], points[sample], middle).sum(axis=0)
        yield 0
    groups = [np.empty((0, cluster_size), dtype=np.int64)]
    left = np.ones(len(points), dtype=bool)
    for i in np.argsort(-n_near, kind="stable"):
        if n_near[i] <= smallest:
            break
        if left[sample[i]]:
            near = np.flatnonzero(left & _near(points, points[sample[i], None], middle)[:, 0])
            if len(near) > smallest:
                near = near[: len(near) // cluster_size * cluster_size]
                groups.append(near.reshape(-1, cluster_size))
                left[near] = False
    return np.concatenate(groups), np.flatnonzero(left)


def _near(points: Array, centres: Array, middle: Array) -> Array:
    """Whether points (R, D) are near-duplicates of centres (M, D): (R, M) bool."""
    own, central = _squares(points), _squares(centres)
    limit = DUPLICATE_DISTANCE * _squares(centres - middle) + ROUNDING * central
    # |x - y|² <= limit, solved for x · y
    return points @ centres.T >= 0.5 * (own[:, None] + central - limit)


def _balanced_kmeans(
    points: Array, capacity: Array, passes: int, rng: np.random.Generator
) -> Counts[list[Array]]:
    """Entry j holds the j-th member of each cluster that has more than j: the first ones, since the
    capacity (C,) descends."""
    n_points, n_clusters = len(points), len(capacity)
    members = [rng.permutation(n_points)[:n_clusters]]
    prices = np.zeros(n_clusters, dtype=np.float32)
    every = np.arange(n_points)
    block, first_ones = every[:BLOCK_ROWS], _centroids(points, members)
    library = faster_library(lambda xp: list(_shortlists(points, block, first_ones, xp)))
    for iteration in range(passes):
        centroids = _centroids(points, members)
        ids, scores = yield from _shortlists(points, every, centroids, library)
        # prices move until demand for each centroid meets its capacity
        step = 0.3 * np.median(scores.max(axis=1) - np.median(scores, axis=1))
        for _ in range(PRICE_STEPS[min(iteration, 1)]):
            best = (scores - prices[ids]).argmax(axis=1)
            wanted = np.bincount(ids[every, best], minlength=n_clusters)
            prices += (step * np.clip(wanted / capacity - 1, -1, 2)).astype(np.float32)
            step *= 0.95
            yield 0
        free, assigned, waiting = capacity.copy(), np.full(n_points, -1), every
        while len(waiting):
            _place(waiting, ids, scores - prices[ids], free, assigned)
            waiting = np.flatnonzero(assigned < 0)
            if len(waiting):  # their lists are full: they get one of the open clusters
                yield 0
                opened = np.flatnonzero(free)
                listed, scores = yield from _shortlists(points, waiting, centroids[opened], library)
                ids = opened[listed]
        order = np.argsort(assigned, kind="stable")
        first = np.cumsum(capacity) - capacity
        members = [order[first[capacity > j] + j] for j in range(capacity[0])]
    return members


def _centroids(points: Array, members: list[Array]) -> Array:
    """(c, -|c|²/2) for the means c: the product with a point grows as the point comes nearer."""
    centroids = points[members[0]]
    for column in members[1:]:
        for start in range(0, len(column), BLOCK_ROWS):
            ids = column[start : start + BLOCK_ROWS]
            centroids[start : start + len(ids)] += points[ids]
    centroids[:, :-1] /= centroids[:, -1:]
    centroids[:, -1] = -0.5 * _squares(centroids[:, :-1])
    return centroids


def faster_library(work: Callable[[Any], object]) -> Any:
    """numpy, or ``mlx.core`` where its device is a GPU that does the work of a block sooner. Both
    give clusters of the same quality."""
    if mx.default_device().type != mx.gpu:
        return np
    work(mx)  # compiles the kernels
    return min((np, mx), key=lambda library: timeit.timeit(partial(work, library), number=1))


def _shortlists(
    points: Array, rows: Array, centroids: Array, library: Any
) -> Counts[tuple[Array, Array]]:
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
        yield len(best)
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
