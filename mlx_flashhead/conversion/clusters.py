"""Clusters of a head's rows.

Balanced k-means: each row keeps a shortlist of its best centroids, prices make crowded ones dearer,
and a fill with hard capacities places every row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from . import Progress, Task
from .checkpoint import NOT_KEPT, Arrays, Checkpoint, checksum

# A row's shortlist has so many centroids.
LIST_LENGTH = 24
# There are at least so many buckets of centroids, if there are so many centroids. A shortlist holds
# one centroid of each at most.
BUCKETS = 256
# The number of dense passes over all rows.
PASSES = 6
QUICK_PASSES = 2
# The number of price updates in the first pass, and in each later one.
FIRST_PRICE_UPDATES = 40
LATER_PRICE_UPDATES = 20

# So many rows and scores are computed at once, which bounds memory.
BLOCK_ROWS = 2048
BLOCK_SCORES = 1 << 22

# The progress of this stage is that of the rows of all passes.
STAGE = "Clustering"

# Rows are duplicates if their squared distance is at most this share of that to the mean of all
# rows. They are searched around a sample.
DUPLICATE_DISTANCE = 0.2
DUPLICATE_SAMPLE = 1024

Array = np.ndarray


def cluster_rows(
    rows: Array,
    cluster_size: int = 16,
    *,
    seed: int = 0,
    metric: Array | None = None,
    passes: int = PASSES,
    checkpoint: Checkpoint = NOT_KEPT,
) -> Task[Array]:
    """Groups the rows of a head into clusters of equal size.

    The same seed gives the same clusters on a device.

    Source: FlashHead, arXiv 2603.14591, clusters its rows by balanced spherical k-means. The way to
        the balance and the metric are this project's own.

    Args:
        rows: Of the head (V, D), float32.
        cluster_size: Rows per cluster.
        seed: Of the beginning.
        metric: A matrix (D, d) float32 that multiplies the rows first; None: only their directions
            count.
        passes: Dense passes over all rows.
        checkpoint: Keeps the passes.

    Returns:
        Token ids (C, cluster_size) uint32, C = ceil(V / cluster_size): each of 0 … V-1 once,
        ascending within a cluster. V marks padded slots, at a cluster's end.

    Raises:
        ValueError: If a row is not finite.
    """
    if not np.isfinite(rows).all():
        raise ValueError("The rows hold NaN or infinity: check the model's output weights.")
    rng = np.random.default_rng(seed)
    vocab_size = len(rows)
    total = passes * vocab_size
    points = yield from _points(rows, metric, total)
    grouped, others = yield from _group_duplicates(points[:, :-1], cluster_size, rng, total)
    n_clusters = -(-len(others) // cluster_size)
    token_ids = np.full((len(grouped) + n_clusters, cluster_size), vocab_size, dtype=np.uint32)
    token_ids[: len(grouped)] = grouped
    if n_clusters:
        # The others move to the front, without a second copy.
        for block in _slices(len(others), BLOCK_ROWS):
            points[block] = points[others[block]]
        capacity = np.full(n_clusters, len(others) // n_clusters)
        capacity[: len(others) % n_clusters] += 1
        source = 0
        if metric is not None:
            source = checksum(metric)
        kept = _KeptPasses(checkpoint, source)
        members = yield from _balanced_kmeans(
            points[: len(others)], capacity, passes, rng, total, kept
        )
        for column, ids in enumerate(members):
            token_ids[len(grouped) : len(grouped) + len(ids), column] = others[ids]
    return np.sort(token_ids, axis=1)


def _points(rows: Array, metric: Array | None, total: int) -> Task[Array]:
    """The only copy of the rows: less their mean, for exact distances, and a column of ones."""
    n_columns = rows.shape[1]
    if metric is not None:
        n_columns = metric.shape[1]
    points = np.ones((len(rows), n_columns + 1), dtype=np.float32)
    mapped = points[:, :-1]
    for block in _slices(len(rows), BLOCK_ROWS):
        if metric is None:
            norms = np.sqrt(_squared_norms(rows[block]))
            mapped[block] = rows[block] / np.where(norms > 0, norms, 1)[:, None]
        else:
            mapped[block] = rows[block] @ metric
        yield Progress(STAGE, 0, total)
    mapped -= mapped.mean(axis=0, dtype=np.float64).astype(np.float32)
    return points


def _slices(length: int, size: int) -> Iterator[slice]:
    """The slices of ``size`` that cover a length."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _group_duplicates(
    points: Array, cluster_size: int, rng: np.random.Generator, total: int
) -> Task[tuple[Array, Array]]:
    """Groups large sets of nearly identical rows, such as those of unused tokens.

    They would crowd the same few shortlists. Returns the ids (G, cluster_size) of such sets, and
    the ascending ids of all other rows.
    """
    sample = rng.permutation(len(points))[:DUPLICATE_SAMPLE]
    smallest = LIST_LENGTH * cluster_size
    n_near = np.zeros(len(sample), dtype=np.int64)
    for block in _slices(len(points), BLOCK_ROWS):
        n_near += _near(points[block], points[sample]).sum(axis=0)
        yield Progress(STAGE, 0, total)
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


def _squared_norms(vectors: Array) -> Array:
    """Squared norms (R,) of vectors (R, D), without a temporary copy of them."""
    return np.einsum("rd,rd->r", vectors, vectors)


def _near(points: Array, centres: Array) -> Array:
    """Whether points (R, D) are duplicates of centres (M, D): (R, M) bool. Their mean is zero."""
    norms = _squared_norms(points)
    centre_norms = _squared_norms(centres)
    # |x - y|² <= limit, solved for x · y.
    return points @ centres.T >= 0.5 * (norms[:, None] + (1 - DUPLICATE_DISTANCE) * centre_norms)


@dataclass
class _KeptPasses:
    """What is kept: how the latest whole pass ended, and the shortlists of the next one."""

    checkpoint: Checkpoint
    source: int

    def __post_init__(self) -> None:
        self.before = self.checkpoint.read("clusters", self.source)
        self.ended: Arrays = {}

    def put_back(self, iteration: int, ids: Array, scores: Array) -> int:
        """Puts the kept shortlists of a pass back. Returns of how many rows there were some."""
        if self.before.get("iteration") != iteration or not len(self.before["ids"]):
            return 0
        n_kept = len(self.before["ids"])
        ids[:n_kept] = self.before["ids"]
        scores[:n_kept] = self.before["scores"]
        return n_kept

    def offer(self, iteration: int, ids: Array, scores: Array, n_listed: int) -> None:
        """Keeps shortlists (R, L) of the first rows of a pass."""

        def arrays() -> Arrays:
            lists = {"ids": ids[:n_listed].astype(np.int32), "scores": scores[:n_listed]}
            return {"iteration": np.array(iteration), **self.ended, **lists}

        self.checkpoint.offer("clusters", self.source, arrays)


def _balanced_kmeans(
    points: Array,
    capacity: Array,
    passes: int,
    rng: np.random.Generator,
    total: int,
    kept: _KeptPasses,
) -> Task[list[Array]]:
    """Fills clusters of the ``capacity`` (C,), which descends.

    Entry j of the result holds the j-th member of each cluster that has more than j members. These
    are the first clusters, since the capacity descends.
    """
    n_points = len(points)
    n_clusters = len(capacity)
    members = [rng.permutation(n_points)[:n_clusters]]
    prices = np.zeros(n_clusters, dtype=np.float32)
    every = np.arange(n_points)
    first_pass = int(kept.before.get("iteration", 0))
    if first_pass:
        members = _members(kept.before["order"], capacity)
        prices = kept.before["prices"]
        kept.ended = {"order": kept.before["order"], "prices": prices.copy()}
        yield Progress(STAGE, first_pass * n_points, total, kept=True)
    for iteration in range(first_pass, passes):
        centroids = _centroids(points, members)
        ids, scores = yield from _shortlists(points, every, centroids, total, kept, iteration)
        # Prices move until demand for each centroid meets its capacity.
        n_updates = LATER_PRICE_UPDATES
        if iteration == 0:
            n_updates = FIRST_PRICE_UPDATES
        change = 0.3 * np.median(scores.max(axis=1) - np.median(scores, axis=1))
        for _ in range(n_updates):
            best = (scores - prices[ids]).argmax(axis=1)
            wanted = np.bincount(ids[every, best], minlength=n_clusters)
            prices += (change * np.clip(wanted / capacity - 1, -1, 2)).astype(np.float32)
            change *= 0.95
            yield Progress(STAGE, 0, total)
        free = capacity.copy()
        assigned = np.full(n_points, -1)
        waiting = every
        while len(waiting):
            _assign(waiting, ids, scores - prices[ids], free, assigned)
            waiting = np.flatnonzero(assigned < 0)
            if len(waiting):
                # Their lists are full: they get one of the open clusters.
                yield Progress(STAGE, 0, total)
                opened = np.flatnonzero(free)
                listed, scores = yield from _shortlists(points, waiting, centroids[opened], total)
                ids = opened[listed]
        order = np.argsort(assigned, kind="stable")
        members = _members(order, capacity)
        kept.ended = {"order": order, "prices": prices.copy()}
        kept.offer(iteration + 1, ids[:0], scores[:0], 0)
    return members


def _members(order: Array, capacity: Array) -> list[Array]:
    """The j-th members of the clusters, for each j, of points in the order of their clusters."""
    first = np.cumsum(capacity) - capacity
    return [order[first[capacity > j] + j] for j in range(capacity[0])]


def _centroids(points: Array, members: list[Array]) -> Array:
    """(c, -|c|²/2) for the means c: the product with a point grows as the point comes nearer."""
    centroids = points[members[0]]
    for column in members[1:]:
        centroids[: len(column)] += points[column]
    centroids[:, :-1] /= centroids[:, -1:]
    centroids[:, -1] = -0.5 * _squared_norms(centroids[:, :-1])
    return centroids


def _shortlists(
    points: Array,
    chosen: Array,
    centroids: Array,
    total: int,
    kept: _KeptPasses | None = None,
    iteration: int = 0,
) -> Task[tuple[Array, Array]]:
    """Ids and scores (R, 24 or C) of the best centroids of the ``chosen`` points (R,), unordered.

    They are the best ones of buckets, found in rounds of pairs, which take less time than the
    product with all centroids. With ``kept`` those of a pass are kept, and taken up again.
    """
    library = _fastest_library()
    n_clusters = len(centroids)
    length = min(LIST_LENGTH, n_clusters)
    n_rounds = max(n_clusters // BUCKETS, 1).bit_length() - 1
    n_buckets = -(-n_clusters // 2**n_rounds)
    padding = n_buckets * 2**n_rounds - n_clusters
    columns = _columns(centroids, padding, library)
    ids = np.empty((len(chosen), length), dtype=np.int64)
    scores = np.empty((len(chosen), length), dtype=np.float32)
    size = max(1, min(BLOCK_ROWS, BLOCK_SCORES // n_clusters))
    n_kept = 0
    if kept is not None:
        n_kept = kept.put_back(iteration, ids, scores)
    yield Progress(STAGE, n_kept, total, kept=True)
    for block in _slices(len(chosen), size):
        if block.stop <= n_kept:
            continue
        best = library.array(points[chosen[block]]) @ columns
        if padding:
            best[:, n_clusters:] = -np.inf
        rounds = []
        for _ in range(n_rounds):
            rounds.append(best)
            half = best.shape[1] // 2
            best = library.maximum(best[:, :half], best[:, half:])
        winners = library.argpartition(best, n_buckets - length, axis=1)[:, n_buckets - length :]
        best = library.take_along_axis(best, winners, axis=1)
        for products in reversed(rounds):
            lost = library.take_along_axis(products, winners, axis=1) != best
            winners = winners + lost * (products.shape[1] // 2)
        ids[block] = np.asarray(winners)
        scores[block] = np.asarray(best)
        if kept is not None:
            kept.offer(iteration, ids, scores, block.stop)
        yield Progress(STAGE, len(best), total)
    return ids, scores


def _fastest_library() -> Any:
    """The library of products: MLX where it has a GPU, else NumPy."""
    if mx.default_device().type == mx.gpu:
        return mx
    return np


def _columns(centroids: Array, padding: int, library: Any) -> Any:
    """The centroids (C, D) as columns (D, C + padding) of a library."""
    if padding:
        centroids = np.pad(centroids, ((0, padding), (0, 0)))
    if library is np:
        # An array of its own would be another copy.
        return centroids.T
    return library.array(centroids.T)


def _assign(waiting: Array, ids: Array, utilities: Array, free: Array, assigned: Array) -> None:
    """Assigns points to clusters, as long as one of their lists is open.

    Each waiting point (R,) proposes to its best open cluster, which accepts those with most to
    lose. ``free`` (C,) and ``assigned`` (V,), -1 for none, change.
    """
    while len(waiting):
        utilities = np.where(free[ids] > 0, utilities, -np.inf)
        every = np.arange(len(waiting))
        best = utilities.argmax(axis=1)
        most = utilities[every, best]
        choice = ids[every, best]
        utilities[every, best] = -np.inf
        # It is inf - inf where no cluster is open.
        with np.errstate(invalid="ignore"):
            regret = most - utilities.max(axis=1)
        utilities[every, best] = most
        can = np.flatnonzero(most > -np.inf)
        order = can[np.lexsort((-regret[can], choice[can]))]
        wanted = np.bincount(choice[order], minlength=len(free))
        rank = np.arange(len(order)) - (np.cumsum(wanted) - wanted)[choice[order]]
        accepted = order[rank < free[choice[order]]]
        assigned[waiting[accepted]] = choice[accepted]
        free -= np.minimum(wanted, free)
        left = can[assigned[waiting[can]] < 0]
        waiting = waiting[left]
        ids = ids[left]
        utilities = utilities[left]
