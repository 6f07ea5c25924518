"""The tokens that were not scored and may matter most."""

from typing import NamedTuple

import mlx.core as mx

from .clustered import ClusteredRows
from .interval import Interval


class Near(NamedTuple):
    """The tokens of some clusters of k states, N each; scored ones have the lowest value."""

    logits: Interval  # (k, N)
    ids: mx.array  # (k, N) uint32
    # (k, 1), the highest that the logit of any other token may be; None where there is no other
    best_other: mx.array | None


def nearest(clustered: ClusteredRows, unscored: Interval, n_clusters: int) -> Near:
    """Takes the clusters with the best logits.

    Args:
        clustered: The rows.
        unscored: The logits (k, C, n), of the scored tokens the lowest value.
        n_clusters: How many clusters are taken, if there are so many.
    """
    if clustered.n_clusters <= n_clusters:
        logits = unscored.map(lambda array: array.flatten(1))
        ids = mx.broadcast_to(clustered.token_ids.reshape(1, -1), logits.logits.shape)
        return Near(logits, ids, None)
    bests = unscored.highest
    order = mx.argpartition(-bests, kth=n_clusters, axis=-1)
    best_other = mx.take_along_axis(bests, order[:, n_clusters : n_clusters + 1], axis=-1)
    taken = order[:, :n_clusters]
    logits = unscored.map(
        lambda array: mx.take_along_axis(array, taken[..., None], axis=1).flatten(1)
    )
    return Near(logits, mx.take(clustered.token_ids, taken, axis=0).flatten(1), best_other)
