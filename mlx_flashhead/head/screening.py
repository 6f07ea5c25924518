"""Which proposals of k states are the dense choice for sure, in plain MLX operations.

The logits of all slots decide it. ``metal/flash_head/certain.h`` has the rules, and the same as a
kernel.

Every logit lies within a tolerance. A token is certain if it is the choice whatever the logits are
within theirs.
"""

import math
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from . import inverse_cdf
from .clustered import ClusteredRows, in_token_order
from .draw import Draws, log_mass
from .interval import LOWEST, Interval, Scored, as_mlx_lm_draws, surely_left_out
from .logit_map import LogitMap
from .margins import IN_16_BITS, MASS_MARGIN, merging_distance, noise_margin
from .near import nearest
from .proposal import Proposal, Screen, Tolerance

LIKELY_NOISE = 11.0  # one in e^11 tokens has more
MOST_NATS = 80.0  # the exponential of more is infinite
NEAREST = 1024  # clusters not scored whose noise is computed if filters leave tokens out


def screen(
    clustered: ClusteredRows,
    slots: mx.array,
    proposal: Proposal,
    draws: Draws | None,
    tolerance: Tolerance,
    epsilon: float,
    logit_map: LogitMap,
    allowed: mx.array | None,
) -> Screen:
    """Which proposals of k states are the dense choice for sure; see ``PortableSteps.screen``."""
    lowest = mx.array(LOWEST)
    scored = _scored(clustered, proposal, tolerance, logit_map, slots.dtype)
    others = _not_scored(clustered, slots, proposal, allowed)
    largest = mx.max(mx.abs(slots), axis=(1, 2)).astype(mx.float32)
    best = mx.maximum(mx.max(others, axis=(1, 2)).astype(mx.float32), lowest)[:, None]
    best_high = _highest(best, tolerance, logit_map, slots.dtype)
    unscored = _mapped(others, tolerance, logit_map)
    mass = unscored.mass
    tail_low, tail_high = unscored.masses(mass)
    if draws is None or draws.any_greedy:
        if epsilon > IN_16_BITS and logit_map.identity:
            bound = tail_high
        else:  # without a pass over all logits
            bound = best_high + math.log(clustered.vocab_size)
        certain = _greedy_is_certain(scored, best_high, bound, epsilon)
    if draws is not None:
        by_number = partial(
            inverse_cdf.is_certain, clustered, scored, unscored, mass, draws, epsilon
        )
        if draws.uniform is None:
            bounds = best_high, tail_low, tail_high
            by_noise = partial(_noise_is_certain, clustered, scored, unscored, *bounds, draws)
        else:
            by_noise = partial(
                _mlx_noise_is_certain, clustered, scored, unscored, mass, draws, epsilon
            )
        drawn = draws.by_kind(by_number, by_noise)[:, None]
        if draws.any_greedy:
            drawn = mx.where(draws.inverse_temperature == 0, certain, drawn)
        certain = drawn
    certain = certain[:, 0] & (largest < mx.inf)  # float16 may overflow
    return Screen(certain, largest, best[:, 0], mass[:, 0])


def _scored(
    clustered: ClusteredRows,
    proposal: Proposal,
    tolerance: Tolerance,
    logit_map: LogitMap,
    dtype: mx.Dtype,
) -> Scored:
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
    share = mx.where(absolute > 0, rounding, 0.0) + slack if rounding or slack else None

    def interval(values: mx.array) -> Interval:
        off = absolute if share is None else absolute + share * mx.abs(values)
        return Interval(values, off)

    return Scored(ids, tokens, *map(interval, (own, logits, rest, second)))


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
    places = mx.minimum(token_ids // 32, allowed.shape[1] - 1)  # of padded slots
    words = mx.take(allowed, places, axis=1)
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
    # rounded to the nearest: no value of the dtype below `high` is rounded higher
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
    if not tolerance.relative:  # the same for all logits of a state
        sizes = mx.max(mx.where(others == -mx.inf, 0.0, sizes), axis=(1, 2), keepdims=True)
    return Interval(mapped, logit_map.slope * off + share * sizes)


def _greedy_is_certain(
    scored: Scored, best_high: mx.array, bound: mx.array, epsilon: float
) -> mx.array:
    """Returns whether the token's logit is above every other: (k, 1) bool.

    Log-probabilities have the relative spacing ``epsilon``, and rounding must not make it equal to
    another. ``bound`` is the greatest mass that the tokens not scored may have.
    """
    second_high = scored.second.high
    most = mx.logaddexp(log_mass(scored.all.logits), bound)
    merged = merging_distance(most, scored.second.logits, epsilon)
    merged_others = merging_distance(most, best_high, epsilon)
    above_scored = scored.own.low - second_high > merged
    return above_scored & (scored.own.low - best_high > merged_others)


def _mlx_noise_is_certain(
    clustered: ClusteredRows,
    scored: Scored,
    unscored: Interval,
    unscored_mass: mx.array,
    draws: Draws,
    epsilon: float,
) -> mx.array:
    """:func:`_noise_is_certain` of draws from rounded log-probabilities, as mlx-lm's are."""
    mass = mx.logaddexp(scored.all.mass, unscored_mass)
    rounded = Scored(
        scored.ids,
        scored.tokens,
        *(as_mlx_lm_draws(values, mass, epsilon) for values in scored[2:]),
    )
    others = as_mlx_lm_draws(unscored, mass[..., None], epsilon)
    best_high = mx.max(others.highest, axis=-1, keepdims=True)
    bounds = best_high, *others.masses(unscored_mass)
    return _noise_is_certain(clustered, rounded, others, *bounds, draws)


def _noise_is_certain(
    clustered: ClusteredRows,
    scored: Scored,
    unscored: Interval,
    best_high: mx.array,
    tail_low: mx.array,
    tail_high: mx.array,
    draws: Draws,
) -> mx.array:
    """Returns whether no other token can be drawn by noise than the proposed one: (k,) bool.

    It is so if the filters keep the token, and no other token that they may keep can have a higher
    noisy logit.
    """
    inverse = draws.inverse_temperature
    floor = scored.own.low
    scored_low, scored_high = scored.all.masses(scored.all.mass)
    least = mx.logaddexp(scored_low, tail_low)
    most = mx.logaddexp(scored_high, tail_high)
    kept = _is_kept(scored, unscored, best_high, least, draws)

    # the highest logit of those whose noisy logit may reach the token's
    high = scored.rest.high
    near = _rivals(clustered, unscored, draws)
    own_noise, scored_noise, near_noise = _noises(clustered, scored, near.ids, draws)
    worst = floor * inverse + own_noise
    worst = worst - noise_margin(worst)

    def highest_reaching(high: mx.array, gumbel: mx.array) -> mx.array:
        reaching = mx.where(high * inverse + gumbel >= worst, high, -mx.inf)
        return mx.max(reaching, axis=-1, keepdims=True)

    rival = mx.maximum(
        highest_reaching(high, scored_noise), highest_reaching(near.logits.high, near_noise)
    )
    if near.best_other is not None:
        rival = mx.maximum(rival, near.best_other)

    # the filters leave it out, and so all below it
    cut = (worst - LIKELY_NOISE) / inverse
    near_low = near.logits.low
    near_over = mx.where(near_low > cut, mx.exp(near_low - most), 0).sum(axis=-1, keepdims=True)
    near_over = mx.where(rival <= cut, near_over, 0)
    left_out = surely_left_out(rival, scored.all, draws, most, near_over)
    return (kept & ((rival == -mx.inf) | left_out))[:, 0]


def _is_kept(
    scored: Scored, unscored: Interval, best_high: mx.array, log_total: mx.array, draws: Draws
) -> mx.array:
    """Returns whether the filters keep the proposed token, whatever lies above it: (k, 1) bool.

    ``log_total`` (k, 1) is the log of the least mass of all tokens.
    """
    floor = scored.own.low
    high = scored.rest.high
    over = high > floor
    rivals = unscored.logits > floor[..., None] - unscored.off
    n_rivals = rivals.sum(axis=(1, 2))[:, None]
    # by min-p; without one it holds unless a logit is NaN
    kept = floor >= mx.maximum(scored.second.high, best_high) + draws.log_min_p
    if draws.any_top_p:
        share = mx.where(over, mx.exp(high - log_total), 0).sum(axis=-1, keepdims=True)
        # of the others: their number times the best of them
        share = share + n_rivals * mx.exp(mx.minimum(best_high - log_total, MOST_NATS))
        kept &= (draws.top_p >= 1) | (share < draws.top_p * (1 - MASS_MARGIN))
    if draws.most_top_k:
        n_over = over.sum(axis=-1, keepdims=True) + n_rivals
        kept &= (draws.top_k == 0) | (n_over < draws.top_k)
    return kept


class _Rivals(NamedTuple):
    """The tokens of k states that were not scored and may win."""

    logits: Interval  # (k, N)
    ids: mx.array | None  # (k, N) uint32; None: all tokens in their order
    best_other: mx.array | None  # (k, 1), the highest that any other's logit may be


def _rivals(clustered: ClusteredRows, unscored: Interval, draws: Draws) -> _Rivals:
    """All tokens, or where the draws have filters those of the nearest clusters."""
    if clustered.n_clusters <= NEAREST or not all(s.filters or s.greedy for s in draws.rows):
        logits = unscored.map(lambda array: in_token_order(array.flatten(1), clustered.slot_of))
        return _Rivals(logits, None, None)
    return _Rivals(*nearest(clustered, unscored, NEAREST))


def _noises(
    clustered: ClusteredRows, scored: Scored, near_ids: mx.array | None, draws: Draws
) -> tuple[mx.array, mx.array, mx.array]:
    """The noise of the proposed tokens, of the scored ones, and of those that are near."""
    known = mx.concatenate([scored.tokens, scored.ids], axis=-1)
    if near_ids is None:
        of_near = draws.noise_of_all(clustered.vocab_size)
        # that of a padded slot does not matter
        known = mx.minimum(known, clustered.vocab_size - 1)
        of_known = mx.take_along_axis(of_near, known, axis=-1)
    else:
        every = draws.noise(mx.concatenate([known, near_ids], axis=-1))
        of_known, of_near = mx.split(every, [known.shape[-1]], axis=-1)
    return of_known[:, :1], of_known[:, 1:], of_near
