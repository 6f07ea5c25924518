"""The draw of ``mx.random.categorical`` from one row, for proposals and for their verification.

    token = the first one, in the order of ids, with (weights up to it) > number · (all weights)
    weight = exp(logit / temperature);  number: uniform between 0 and 1

A row of :class:`Draws` with ``inverse_cdf`` has the bits of that float32 number in its key.

Source: ``categorical_inverse_cdf`` in MLX's random.cpp, since 0.32.1 for each single row.
"""

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

NEAREST = 256  # clusters not scored that are looked at token by token if filters may keep some


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
    clustered: ClusteredRows, scored: Scored, unscored: Interval, draws: Draws, epsilon: float
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
        draws: Of k rows.
        epsilon: The relative spacing of the model's log-probabilities.

    Returns:
        (k,) bool.
    """
    inverse = draws.inverse_temperature
    filtered = [settings.filters for settings in draws.rows]
    unfiltered = mx.array([not each for each in filtered])[:, None]
    mass = mx.logaddexp(log_mass(scored.all.logits), log_mass(unscored.logits.flatten(1)))
    all_scored = as_mlx_lm_draws(scored.all, mass, epsilon)
    others = as_mlx_lm_draws(unscored, mass[..., None], epsilon)
    least, most = map(mx.logaddexp, all_scored.masses(), others.masses())
    known = all_scored
    ids = scored.ids
    best_other = mx.max(others.highest, axis=-1, keepdims=True)
    if any(filtered):  # they may keep some of the others
        near = nearest(clustered, others, NEAREST)
        more = near.logits
        if not all(filtered):  # rows without filters count all of them below
            more = Interval(mx.where(unfiltered, LOWEST, more.logits), more.off)
            best_other = mx.where(unfiltered, best_other, near.best_other)
        else:
            best_other = near.best_other
        known = all_scored.beside(more)
        ids = mx.concatenate([scored.ids, near.ids], axis=-1)
    # filters must leave out all tokens that are not known
    left_out = surely_left_out(best_other, known, draws, most, mx.array(0.0))
    evened = known.evenly() if epsilon < IN_16_BITS else known  # is sorted once
    high_cut, low_cut = cuts(evened, draws, least - MASS_MARGIN, most + MASS_MARGIN)
    surely = surely_kept(known.low, evened.high, draws, high_cut)
    maybe = known.high >= low_cut

    best = mx.maximum(mx.max(known.high, axis=-1, keepdims=True), best_other)
    at_least = mx.where(surely, mx.exp((known.low - best) * inverse), 0)
    at_most = mx.where(maybe, mx.exp((known.high - best) * inverse), 0)
    own = ids == scored.tokens
    own_least = mx.where(own, at_least, 0).sum(axis=-1, keepdims=True)
    own_most = mx.where(own, at_most, 0).sum(axis=-1, keepdims=True)
    sums = _sums(at_least, at_most, ids, scored.tokens)
    if not all(filtered):
        scale = inverse[..., None]
        highest = best[..., None]
        at_least = mx.exp((others.low - highest) * scale).flatten(1)
        at_most = mx.exp((others.high - highest) * scale).flatten(1)
        ids = clustered.token_ids.reshape(1, -1)
        sums = sums + mx.where(unfiltered, _sums(at_least, at_most, ids, scored.tokens), 0)

    lower_least, lower_most, higher_least, higher_most, lost = mx.split(sums, 5, axis=-1)
    lost = lost + SUM_ROUNDING * (EXP_UNITS + 1) * (lower_most + own_most + higher_most)
    number = draws.numbers
    reached = lower_most + lost <= number * (lower_most + own_least + higher_least)
    passed = number * (lower_least + own_least + higher_most) + lost < lower_least + own_least
    return ((own_least > 0) & reached & passed & (left_out | unfiltered))[:, 0]


def _sums(at_least: mx.array, at_most: mx.array, ids: mx.array, tokens: mx.array) -> mx.array:
    """Sums of weights, separately for tokens with lower and with higher ids.

    Args:
        at_least: The least that the weights may be, (k, K).
        at_most: The most that they may be, (k, K).
        ids: The tokens, (k, K) or (1, K).
        tokens: The proposed ones, (k, 1).

    Returns:
        (k, 5) float32: the least and the most of the lower ids, those of the higher ids, and the
        most that additions of the weights can lose.
    """
    lower = ids < tokens
    higher = ids > tokens
    unit = SUM_ROUNDING * at_most.sum(axis=-1, keepdims=True)
    parts = (
        mx.where(lower, at_least, 0),
        mx.where(lower, at_most, 0),
        mx.where(higher, at_least, 0),
        mx.where(higher, at_most, 0),
        mx.minimum(at_most, unit),
    )
    return mx.concatenate([part.sum(axis=-1, keepdims=True) for part in parts], axis=-1)
