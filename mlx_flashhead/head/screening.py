"""Which proposals of k states are the dense choice for sure, in plain MLX operations.

Every logit of the product lies within a tolerance, which gives bounds of the model's logits. The
kinds of draws say whether a token is certain within these. ``metal/flash_head/certain.h`` has the
same as a kernel.
"""

import mlx.core as mx

from .clustered import ClusteredRows
from .draws.bounds import LOWEST, Bounds, Interval, Scored
from .draws.draw import Draws
from .logit_map import LogitMap
from .proposal import Proposal, Screen, Tolerance


def screen(
    clustered: ClusteredRows,
    slots: mx.array,
    proposal: Proposal,
    draws: Draws,
    tolerance: Tolerance,
    epsilon: float,
    logit_map: LogitMap,
    allowed: mx.array | None,
) -> Screen:
    """Which proposals of k states are the dense choice: as :meth:`PortableOperations.screen`."""
    others = _not_scored(clustered, slots, proposal, allowed)
    best = mx.max(others, axis=(1, 2)).astype(mx.float32)
    best = mx.maximum(best, LOWEST)[:, None]
    scored = _scored(clustered, proposal, tolerance, logit_map, slots.dtype)
    unscored = _mapped(others, tolerance, logit_map)
    bounds = Bounds(
        clustered=clustered,
        scored=scored,
        scored_mass=scored.all.mass,
        unscored=unscored,
        unscored_mass=unscored.mass,
        best_unscored=_highest(best, tolerance, logit_map, slots.dtype),
        epsilon=epsilon,
        dtype=logit_map.result_dtype(slots.dtype),
    )
    certain = draws.by_kind(bounds, lambda kind, some, bounds: kind.certain(bounds, some)[:, 0])
    largest = mx.max(mx.abs(slots), axis=(1, 2)).astype(mx.float32)
    # Float16 may overflow.
    certain &= largest < mx.inf
    return Screen(certain, largest, best[:, 0], bounds.unscored_mass[:, 0])


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


def _not_scored(
    clustered: ClusteredRows, slots: mx.array, proposal: Proposal, allowed: mx.array | None
) -> mx.array:
    """Returns the logits of the slots (k, C, n) that were not scored.

    Those that are scored, padded or masked are minus infinity.
    """
    nothing = mx.array(-mx.inf, slots.dtype)
    others = mx.put_along_axis(slots, proposal.probes[..., None], nothing, axis=1)
    if clustered.padded:
        others = mx.where(clustered.token_ids == clustered.vocab_size, nothing, others)
    if allowed is not None:
        others = mx.where(is_allowed(allowed, clustered.token_ids), others, nothing)
    return others


def is_allowed(allowed: mx.array, token_ids: mx.array) -> mx.array:
    """The bits of tokens for each state: words (k, ⌈V/32⌉) uint32, ids (C, n) → bool (k, C, n)."""
    # A padded slot has any word.
    index = mx.minimum(token_ids // 32, allowed.shape[1] - 1)
    words = mx.take(allowed, index, axis=1)
    return (words >> (token_ids % 32)) & 1 != 0


def _highest(
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


def _mapped(others: mx.array, tolerance: Tolerance, logit_map: LogitMap) -> Interval:
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
