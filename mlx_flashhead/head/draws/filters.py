"""What top-p, min-p and top-k keep of a position's logits: each of them is a threshold.

For logits that are known within bounds: what they keep, or leave out, whatever the logits are.
"""

from collections.abc import Sequence

import mlx.core as mx

from ..margins import MASS_MARGIN
from .bounds import Interval
from .draw import Draws

# Logits that are sorted at once: halving more of them takes more operations, which a CPU feels.
SORTED = 65536
BELOW_ALL = mx.array(-mx.inf)


def threshold(logits: mx.array, draws: Draws, log_total: mx.array | None = None) -> mx.array:
    """The lowest logit that the filters keep: (R, K) float32 → (R, 1).

    Args:
        logits: Of R positions.
        draws: Of R positions.
        log_total: (R, 1), the log of the mass of all tokens; None if these are the K.
    """
    return thresholds(logits, draws, [log_total])[0]


def thresholds(
    logits: mx.array, draws: Draws, log_totals: Sequence[mx.array | None]
) -> list[mx.array]:
    """Returns :func:`threshold` for each of several masses of all tokens."""
    lowest = BELOW_ALL
    if draws.any_min_p:
        lowest = mx.max(logits, axis=-1, keepdims=True) + draws.log_min_p
    n_top = min(draws.most_top_k, logits.shape[-1])
    if n_top:
        top = mx.partition(logits, -n_top, axis=-1)[:, -n_top:]
        top = mx.sort(top, axis=-1)
        kth = n_top - mx.clip(draws.top_k, 1, n_top)
        by_count = mx.take_along_axis(top, kth, axis=-1)
        by_count = mx.where(draws.top_k == 0, -mx.inf, by_count)
        lowest = mx.maximum(lowest, by_count)
    if not draws.any_top_p:
        return [lowest] * len(log_totals)
    return [mx.maximum(lowest, each) for each in _by_mass(logits, draws, log_totals)]


def _by_mass(
    logits: mx.array, draws: Draws, log_totals: Sequence[mx.array | None]
) -> list[mx.array]:
    """Returns the lowest logit that top-p keeps, for each mass of all tokens.

    The logits above it have less than ``top_p`` of the mass. They are sorted once; but on a CPU
    many logits are halved first, for each mass: of each half that holds the lowest one another half
    is left, until they are few enough to sort.
    """
    limit = mx.where(draws.top_p < 1, mx.maximum(draws.top_p, 1e-30), mx.inf)
    if logits.shape[-1] > SORTED and mx.default_device().type == mx.cpu:
        return [_by_mass_in_halves(logits, limit, log_total) for log_total in log_totals]
    left = mx.sort(logits, axis=-1)
    first = log_totals[0]
    limits = [limit]
    if first is None:
        masses = mx.softmax(left, axis=-1)
    else:
        masses = mx.exp(left - first)
        limits += [limit * mx.exp(more - first) for more in log_totals[1:] if more is not None]
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    return [_lowest_within(left, above, each) for each in limits]


def _by_mass_in_halves(logits: mx.array, limit: mx.array, log_total: mx.array | None) -> mx.array:
    n_halvings = ((logits.shape[-1] - 1) // SORTED).bit_length()
    left = logits
    total = log_total
    if total is None:
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
    n_more = -logits.shape[-1] % 2**n_halvings
    if n_more:
        left = mx.pad(left, [(0, 0), (0, n_more)], constant_values=-mx.inf)
    for _ in range(n_halvings):
        halves = mx.partition(left, left.shape[-1] // 2, axis=-1)
        low, high = mx.split(halves, 2, axis=-1)
        below_high = limit - mx.exp(high - total).sum(axis=-1, keepdims=True)
        in_low = below_high > 0
        left = mx.where(in_low, low, high)
        limit = mx.where(in_low, below_high, limit)
    left = mx.sort(left, axis=-1)
    masses = mx.exp(left - total)
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    return _lowest_within(left, above, limit)


def _lowest_within(logits: mx.array, above: mx.array, limit: mx.array) -> mx.array:
    """The lowest logit with less than ``limit`` of the mass ``above`` it: (R, K) → (R, 1)."""
    return mx.min(mx.where(above < limit, logits, mx.inf), axis=-1, keepdims=True)


def cuts(
    known: Interval,
    draws: Draws,
    log_least: mx.array,
    log_most: mx.array,
) -> tuple[mx.array, mx.array]:
    """Where the filters cut if all logits are as high, and as low, as they may be.

    Logits of a state that may all be equally far off keep their order, and are sorted once.

    Args:
        known: The logits of K tokens, (k, K).
        draws: Of k positions.
        log_least: (k, 1), the log of the least mass of all tokens.
        log_most: (k, 1), that of the greatest.

    Returns:
        The lowest kept logits, (k, 1) each.
    """
    log_least = log_least - MASS_MARGIN
    log_most = log_most + MASS_MARGIN
    if not known.even:
        (high,) = thresholds(known.high, draws, [log_least])
        (low,) = thresholds(known.low, draws, [log_most])
        return high, low
    off = known.off.reshape(-1, 1)
    high, low = thresholds(known.logits, draws, [log_least - off, log_most + off])
    return high + off, low - off


def surely_kept(
    low: mx.array, high: mx.array, draws: Draws, cut: mx.array, *, equals: bool = True
) -> mx.array:
    """Returns which tokens the filters keep whatever the logits are within bounds: (k, K) bool.

    With all logits as high as they may be, the filters have a cut. A token is kept in any case if
    its lowest logit is above it. So is the token at the cut if no other one can come between: those
    that may lie above it are then the same as at the cut. A token that equals the last of a top-k
    is not kept in any case, as mlx-lm may leave it out.

    Args:
        low: The lowest that the logits of K tokens may be, (k, K) float32.
        high: The highest, (k, K) float32.
        draws: Of k positions.
        cut: (k, 1), that cut: a logit of ``high``, or what min-p asks for.
        equals: Whether all tokens that equal the one at the cut are kept with it.
    """
    over = low > cut
    above = over
    if equals:
        above = low >= cut
        if draws.most_top_k:
            above = mx.where(draws.top_k > 0, over, above)
    at_cut = high == cut
    lowest_at_cut = mx.max(mx.where(at_cut, low, -mx.inf), axis=-1, keepdims=True)
    n_above = (high > cut).sum(axis=-1, keepdims=True)
    n_near = (high >= lowest_at_cut).sum(axis=-1, keepdims=True)
    alone = at_cut & (n_near == n_above + 1)
    if draws.any_min_p:
        alone &= low >= mx.max(high, axis=-1, keepdims=True) + draws.log_min_p
    return above | alone


def surely_left_out(
    highest: mx.array, known: Interval, draws: Draws, log_total: mx.array, more_over: mx.array
) -> mx.array:
    """Returns whether the filters leave out all tokens up to a logit: (k, 1) bool.

    Args:
        highest: The logit, (k, 1).
        known: The logits of some tokens, (k, K).
        draws: Of k positions.
        log_total: (k, 1), the log of the greatest mass of all tokens.
        more_over: (k, 1), the share of it that other tokens above the logit have at least.
    """
    low = known.low
    over = low > highest
    left_out = mx.array(False)
    if draws.any_top_p:
        shares = mx.where(over, mx.exp(low - log_total), 0)
        share = shares.sum(axis=-1, keepdims=True) + more_over
        left_out = (draws.top_p < 1) & (share >= draws.top_p * (1 + MASS_MARGIN))
    if draws.most_top_k:
        n_over = over.sum(axis=-1, keepdims=True)
        left_out |= (draws.top_k > 0) & (n_over >= draws.top_k)
    if draws.any_min_p:
        best = mx.max(low, axis=-1, keepdims=True)
        left_out |= highest < best + draws.log_min_p
    return left_out
