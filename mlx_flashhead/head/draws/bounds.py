"""Logits that are known within bounds, and which tokens they propose."""

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..clustered import ClusteredRows
from ..logit_map import LogitMap
from ..proposal import Proposal, Tolerance

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

    @classmethod
    def of(
        cls,
        clustered: ClusteredRows,
        proposal: Proposal,
        unscored: mx.array,
        best_unscored: mx.array,
        tolerance: Tolerance,
        epsilon: float,
        logit_map: LogitMap,
    ) -> "Bounds":
        """The bounds of the model's logits, by the head's and how far these may be off.

        Args:
            clustered: The rows.
            proposal: Of k positions, with the model's logits of the scored tokens.
            unscored: (k, C, n), the head's logits of the others; minus infinity for what is scored,
                padded or ruled out.
            best_unscored: (k, 1) float32, the best of these.
            tolerance: How far the head's logits may be off.
            epsilon: As the attribute.
            logit_map: What the model does to each of its head's logits.
        """
        scored = _scored(clustered, proposal, tolerance, logit_map, unscored.dtype)
        others = _unscored(unscored, tolerance, logit_map)
        return cls(
            clustered=clustered,
            scored=scored,
            scored_mass=scored.all.mass,
            unscored=others,
            unscored_mass=others.mass,
            best_unscored=_best_unscored(best_unscored, tolerance, logit_map, unscored.dtype),
            epsilon=epsilon,
            dtype=logit_map.result_dtype(unscored.dtype),
        )


def _scored(
    clustered: ClusteredRows,
    proposal: Proposal,
    tolerance: Tolerance,
    logit_map: LogitMap,
    dtype: mx.Dtype,
) -> Scored:
    """The scored tokens, with bounds of the model's logits."""
    logits = proposal.logits.astype(mx.float32).flatten(1)
    ids = mx.take(clustered.token_ids, proposal.probes, axis=0).flatten(1)
    tokens = proposal.tokens[:, None]
    is_own = ids == tokens
    own = mx.max(mx.where(is_own, logits, -mx.inf), axis=-1, keepdims=True)
    rest = mx.where(is_own, LOWEST, logits)
    second = mx.maximum(mx.max(rest, axis=-1, keepdims=True), LOWEST)
    absolute = tolerance.scored[:, None]
    if logit_map.slope != 1:
        absolute = logit_map.slope * absolute
    rounding = tolerance.relative + logit_map.rounding(dtype)
    slack = logit_map.slack(dtype)
    share = None
    if rounding or slack:
        share = mx.where(absolute > 0, rounding, 0.0) + slack

    def interval(values: mx.array) -> Interval:
        if share is None:
            return Interval(values, absolute)
        return Interval(values, absolute + share * mx.abs(values))

    return Scored(
        ids=ids,
        tokens=tokens,
        own=interval(own),
        all=interval(logits),
        rest=interval(rest),
        second=interval(second),
    )


def _unscored(others: mx.array, tolerance: Tolerance, logit_map: LogitMap) -> Interval:
    """The model's logits of the slots (k, C, n) that are left, the lowest value for others."""
    left = others.astype(mx.float32)
    off = tolerance.product[:, None, None]
    left = mx.maximum(left, LOWEST)
    if tolerance.relative:
        off = off + tolerance.relative * mx.abs(left)
    if logit_map.identity:
        return Interval(left, off)
    mapped = logit_map(others).astype(mx.float32)
    mapped = mx.where(others == -mx.inf, LOWEST, mapped)
    share = logit_map.rounding(others.dtype) + logit_map.slack(others.dtype)
    sizes = mx.abs(mapped)
    # All logits of a state are equally far off then.
    if not tolerance.relative:
        sizes = mx.where(others == -mx.inf, 0.0, sizes)
        sizes = mx.max(sizes, axis=(1, 2), keepdims=True)
    return Interval(mapped, logit_map.slope * off + share * sizes)


def _best_unscored(
    logits: mx.array, tolerance: Tolerance, logit_map: LogitMap, dtype: mx.Dtype
) -> mx.array:
    """The highest that the model's logits may be: the head's (k, 1) float32 → (k, 1)."""
    high = logits + tolerance.product[:, None]
    if tolerance.relative:
        high = high + tolerance.relative * mx.abs(logits)
    if logit_map.identity:
        return high
    # This rounds to the nearest: no value of the dtype below `high` is rounded higher.
    mapped = logit_map(high.astype(dtype)).astype(mx.float32)
    mapped = mapped + logit_map.slack(dtype) * mx.abs(mapped)
    return mx.where(logits <= LOWEST, LOWEST, mapped)


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
