"""Logits that are known within bounds, and which tokens they propose."""

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..clustered import ClusteredRows

LOWEST = mx.finfo(mx.float32).min
# From so many logits on, powers of two are faster on a CPU, in more operations.
MANY_LOGITS = 8192


def log_mass(logits: mx.array) -> mx.array:
    """The log of the summed exponentials: (R, K) float32 → (R, 1)."""
    if logits.shape[-1] < MANY_LOGITS or mx.default_device().type != mx.cpu:
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    best = mx.maximum(mx.max(logits, axis=-1, keepdims=True), LOWEST)
    # An exponential takes three times as long.
    powers = mx.power(2.0, (logits - best) * math.log2(math.e))
    total = powers.sum(axis=-1, keepdims=True)
    return best + mx.log(total)


class Interval(NamedTuple):
    """Logits (k, …) float32 and how far each may be off."""

    logits: mx.array
    off: mx.array

    @property
    def low(self) -> mx.array:
        """The lowest that the logits may be."""
        return self.logits - self.off

    @property
    def high(self) -> mx.array:
        """The highest that the logits may be."""
        return self.logits + self.off

    @property
    def highest(self) -> mx.array:
        """The highest that the logits (k, …, n) may be along the last axis: (k, …)."""
        if self.even:
            return mx.max(self.logits, axis=-1) + self.off[..., 0]
        return mx.max(self.high, axis=-1)

    @property
    def even(self) -> bool:
        """Whether all logits of a state may be equally far off."""
        return self.off.size == len(self.logits)

    def evenly(self) -> "Interval":
        """All logits (k, K) of a state as far off as the one that may be farthest off."""
        if self.even:
            return self
        off = mx.where(self.logits > LOWEST, self.off, 0)
        return Interval(self.logits, mx.max(off, axis=-1, keepdims=True))

    def map(self, take: Callable[[mx.array], mx.array]) -> "Interval":
        """Some of the logits (k, K), as ``take`` picks them from an array."""
        if self.even:
            off = self.off.reshape(-1, 1)
        else:
            off = take(self.off)
        return Interval(take(self.logits), off)

    def beside(self, other: "Interval") -> "Interval":
        """The logits (k, K) of these tokens and then those (k, N) of others.

        If both are even, so are all: as far off as the ones that may be farther off.
        """
        logits = mx.concatenate([self.logits, other.logits], axis=-1)
        if self.even and other.even:
            return Interval(logits, mx.maximum(self.off, other.off))
        off = [mx.broadcast_to(part.off, part.logits.shape) for part in (self, other)]
        return Interval(logits, mx.concatenate(off, axis=-1))

    def weights(self, best: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
        """The least and the most that exp((logit - best) * scale) may be: (k, …) each."""
        if not self.even:
            return mx.exp((self.low - best) * scale), mx.exp((self.high - best) * scale)
        middle = mx.exp((self.logits - best) * scale)
        factor = mx.exp(self.off * scale)
        return middle / factor, middle * factor

    @property
    def mass(self) -> mx.array:
        """The log of the logits' summed exponentials, (k, 1)."""
        return log_mass(self.logits.flatten(1))

    def masses(self, mass: mx.array) -> tuple[mx.array, mx.array]:
        """The least and the greatest log of the summed exponentials: (k, 1) each.

        ``mass`` is :attr:`mass`, for which there is a pass over all logits.
        """
        if self.even:
            off = self.off.reshape(-1, 1)
            return mass - off, mass + off
        return log_mass(self.low.flatten(1)), log_mass(self.high.flatten(1))


class Scored(NamedTuple):
    """The K scored tokens of k states. Their logits are the model's.

    Attributes:
        ids: (k, K) uint32.
        tokens: (k, 1) uint32, the proposed ones.
        own: (k, 1), the logits of the proposed ones.
        all: (k, K), the logits of all.
        rest: (k, K), those with the lowest value in the place of the proposed token.
        second: (k, 1), the best of the rest.
    """

    ids: mx.array
    tokens: mx.array
    own: Interval
    all: Interval
    rest: Interval
    second: Interval


class Bounds(NamedTuple):
    """What is known of the model's logits of k states, and a token that is proposed for each.

    Attributes:
        clustered: The rows.
        scored: The scored tokens.
        scored_mass: (k, 1), their :attr:`Interval.mass`.
        unscored: (k, C, n); the lowest value for what is scored, padded or ruled out.
        unscored_mass: (k, 1), that of the others.
        best_unscored: (k, 1), the highest that the best of the others may be.
        epsilon: The relative spacing of the model's log-probabilities.
        dtype: The dtype of the model's logits.
    """

    clustered: ClusteredRows
    scored: Scored
    scored_mass: mx.array
    unscored: Interval
    unscored_mass: mx.array
    best_unscored: mx.array
    epsilon: float
    dtype: mx.Dtype


class Near(NamedTuple):
    """The tokens of some clusters of k states, N each; scored ones have the lowest value.

    Attributes:
        logits: (k, N).
        ids: (k, N) uint32; None: all tokens in their order.
        best_other: (k, 1), the highest that the logit of any other token may be; None where there
            is no other.
    """

    logits: Interval
    ids: mx.array | None
    best_other: mx.array | None


def nearest(clustered: ClusteredRows, unscored: Interval, n_clusters: int) -> Near:
    """Takes the tokens that were not scored of the clusters with the best logits.

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
    taken = order[:, :n_clusters]
    next_best = order[:, n_clusters : n_clusters + 1]
    logits = unscored.map(
        lambda array: mx.take_along_axis(array, taken[..., None], axis=1).flatten(1)
    )
    ids = mx.take(clustered.token_ids, taken, axis=0).flatten(1)
    best_other = mx.take_along_axis(bests, next_best, axis=-1)
    return Near(logits, ids, best_other)
