"""The draw of ``mx.random.categorical`` from one row, for proposals and for their verification.

    token = the first one, in the order of ids, with (weights up to it) > number · (all weights)
    weight = exp(logit / temperature);  number: uniform between 0 and 1

A row of :class:`Draws` with ``inverse_cdf`` has the bits of that float32 number in its key.

Source: ``categorical_inverse_cdf`` in MLX's random.cpp, since 0.32.1 for each single row.
"""

from typing import NamedTuple

import mlx.core as mx

from .clustered import ClusteredRows
from .draw import Draws, log_mass, threshold
from .interval import (
    LOWEST,
    Interval,
    Scored,
    as_mlx_lm_draws,
    cuts,
    surely_kept,
    surely_left_out,
)
from .margins import EXP_UNITS, IN_16_BITS, MASS_MARGIN, SUM_ROUNDING
from .near import nearest

NEAREST = 64  # clusters not scored that are looked at token by token if filters may keep some


def drawn(
    logits: mx.array,
    token_ids: mx.array,
    draws: Draws,
    others: mx.array | None = None,
    kernel: bool = True,
) -> mx.array:
    """Draws a token of each row as if the tokens given were all.

    Args:
        logits: (R, K) float32.
        token_ids: (R, K) uint32.
        draws: Of R rows.
        others: (R, 1), the log of the mass of the other tokens, for the filters.
        kernel: As of :func:`draw.threshold`.

    Returns:
        (R,) uint32.
    """
    kept = logits
    if any(settings.filters for settings in draws.rows):
        total = None if others is None else mx.logaddexp(log_mass(logits), others)
        kept = mx.where(logits >= threshold(logits, draws, total, kernel), logits, -mx.inf)
    best = mx.max(logits, axis=-1, keepdims=True)
    weights = mx.exp((kept - best) * draws.inverse_temperature)
    order = mx.argsort(token_ids, axis=-1)
    sums = mx.cumsum(mx.take_along_axis(weights, order, axis=-1), axis=-1)
    total = sums[:, -1:]
    below = (sums <= draws.numbers * total) & (sums < total)
    place = mx.take_along_axis(order, below.sum(axis=-1, keepdims=True), axis=-1)
    return mx.take_along_axis(token_ids, place, axis=-1)[:, 0]


def is_certain(
    clustered: ClusteredRows,
    scored: Scored,
    unscored: Interval,
    unscored_mass: mx.array,
    draws: Draws,
    epsilon: float,
) -> mx.array:
    """Returns whether each state's token is drawn whatever the logits are within their bounds.

    The token is drawn if the tokens with lower ids weigh no more than the number's share of all,
    and with the token itself more. Within bounds of the weights the first holds in any case if it
    does when lower ids weigh as much as they may and the rest as little, and the second if it does
    when higher ids weigh as much as they may and the rest as little.

    Args:
        clustered: The rows.
        scored: The scored tokens of k states, K each.
        unscored: The logits (k, C, n) of all others; of the scored ones the lowest value.
        unscored_mass: Their :attr:`Interval.mass`, (k, 1).
        draws: Of k rows.
        epsilon: The relative spacing of the model's log-probabilities.

    Returns:
        (k,) bool.
    """
    inverse = draws.inverse_temperature
    filtered = [settings.filters for settings in draws.rows]
    unfiltered = mx.array([not each for each in filtered])[:, None]
    scored_mass = scored.all.mass
    mass = mx.logaddexp(scored_mass, unscored_mass)
    all_scored = as_mlx_lm_draws(scored.all, mass, epsilon)
    others = as_mlx_lm_draws(unscored, mass[..., None], epsilon)
    least, most = map(mx.logaddexp, all_scored.masses(scored_mass), others.masses(unscored_mass))
    known = all_scored
    ids = scored.ids
    near = None
    if any(filtered):  # they may keep some of the others
        near = nearest(clustered, others, NEAREST)
        more = near.logits
        if not all(filtered):  # rows without filters count all of them below
            more = Interval(mx.where(unfiltered, LOWEST, more.logits), more.off)
        known = all_scored.beside(more)
        ids = mx.concatenate([scored.ids, near.ids], axis=-1)
    if epsilon < IN_16_BITS:
        known = known.evenly()  # is sorted once
    high_cut, low_cut = cuts(known, draws, least - MASS_MARGIN, most + MASS_MARGIN)
    surely = surely_kept(known.low, known.high, draws, high_cut)
    maybe = known.high >= low_cut

    best = mx.max(known.high, axis=-1, keepdims=True)
    if not all(filtered):
        best = mx.maximum(best, mx.max(others.highest, axis=-1, keepdims=True))
    least_weights, most_weights = known.weights(best, inverse)
    at_least = mx.where(surely, least_weights, 0)
    at_most = mx.where(maybe, most_weights, 0)
    sums = _Sums.of(at_least, at_most, ids, scored.tokens)
    if not all(filtered):
        at_least, at_most = others.weights(best[..., None], inverse[..., None])
        ids = clustered.token_ids.reshape(1, -1)
        of_others = _Sums.of(at_least.flatten(1), at_most.flatten(1), ids, scored.tokens)
        pairs = zip(sums, of_others, strict=True)
        sums = _Sums(*(one + mx.where(unfiltered, other, 0) for one, other in pairs))

    lost = sums.small + SUM_ROUNDING * (EXP_UNITS + 1) * sums.most
    reached = sums.lower_most + lost <= draws.numbers * sums.if_lower
    passed = draws.numbers * sums.if_higher + lost < sums.to_own_least
    certain = reached & passed
    if near is not None and near.best_other is not None:  # filters must leave out what is not known
        left_out = surely_left_out(near.best_other, known, draws, most, mx.array(0.0))
        certain &= left_out | unfiltered
    return certain[:, 0]


class _Sums(NamedTuple):
    """Sums of the weights of tokens: (k, 1) each."""

    lower_most: mx.array  # of the tokens with lower ids than the proposed one, the most
    if_lower: mx.array  # of all, if these weigh the most and the others the least
    to_own_least: mx.array  # of the lower ids and the proposed one, the least
    if_higher: mx.array  # of all, if these weigh the least and the higher ids the most
    most: mx.array  # of all, the most
    small: mx.array  # the most that additions of the weights can lose

    @classmethod
    def of(cls, at_least: mx.array, at_most: mx.array, ids: mx.array, tokens: mx.array) -> "_Sums":
        """Adds weights.

        Args:
            at_least: The least that the weights may be, (k, K).
            at_most: The most that they may be, (k, K).
            ids: The tokens, (k, K) or (1, K).
            tokens: The proposed ones, (k, 1).
        """

        def added(weights: mx.array) -> mx.array:
            return weights.sum(axis=-1, keepdims=True)

        lower = ids < tokens
        higher = ids > tokens
        if_lower = mx.where(lower, at_most, at_least)
        if_higher = mx.where(higher, at_most, at_least)
        most = added(at_most)
        return cls(
            lower_most=added(mx.where(lower, at_most, 0)),
            if_lower=added(if_lower),
            to_own_least=added(mx.where(higher, 0, at_least)),
            if_higher=added(if_higher),
            most=most,
            small=added(mx.minimum(at_most, SUM_ROUNDING * most)),
        )
