"""The draw of mlx-lm 0.31's samplers with top-p, which keep tokens by rounded sums.

They sort log-probabilities, add up their probabilities from the least one on in their own dtype,
and keep each place at which the sum is greater than 1 - top_p. In exact numbers that is the top-p
of mlx-lm 0.32. In float32 it is so within the error of a sum, which is small. In 16 bits a sum may
lie far from the true one.

But in sorted order each true value lies between those of the bounds, and a sum that is rounded
after each addition never falls where its terms rise. So the same operation on both bounds gives
bounds of it, in whichever order MLX adds. That takes two orders of all tokens, where the sampler
itself takes one.

Source: ``apply_top_p`` in mlx_lm/sample_utils.py of 0.31.3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import mlx.core as mx

from ..margins import FLOAT32, MASS_ROUNDING, SMALLEST_FLOAT16, SMALLEST_FLOAT32
from .bounds import Bounds, Interval, nearest
from .draw import Draw, Draws
from .filters import cuts, surely_kept, surely_left_out
from .inverse_cdf import NEAREST, InverseCDF, Sums, as_mlx_lm_draws, numbers_of


@dataclass(frozen=True)
class SummedTopP(InverseCDF):
    """Draws by a number, as `InverseCDF`, from the tokens that 0.31's top-p keeps.

    Each position has a top-p. Proposals are cut where 0.32's top-p cuts, which is near.
    """

    @staticmethod
    def certain(bounds: Bounds, draws: Draws) -> mx.array:
        """Returns whether each token is drawn whatever the logits are: as :meth:`Draw.certain`."""
        scored = bounds.scored
        mass = mx.logaddexp(bounds.scored_mass, bounds.unscored_mass)
        near = nearest(bounds.clustered, bounds.unscored, NEAREST)
        values = scored.all.beside(near.logits)
        if bounds.dtype == mx.float32:
            top_p = _kept_in_float32(bounds, draws, values, near.best_other)
        else:
            top_p = _kept_in_16_bits(bounds, draws, values, near.best_other)
        known = as_mlx_lm_draws(values, mass, bounds.epsilon)

        # The other filters see what top-p has left.
        others = _changed(draws, lambda each: replace(each, top_p=1.0))
        high_cut, low_cut = cuts(known, others, mass, mass)
        surely = top_p.surely & surely_kept(known.low, known.high, others, high_cut)
        maybe = known.high >= low_cut
        certain = top_p.n_surely > 0
        if draws.most_top_k:
            # If fewer of the best tokens surely remain, any others may be among the top-k.
            enough = (draws.top_k == 0) | (top_p.n_surely >= draws.top_k)
            min_p = _changed(others, lambda each: replace(each, top_k=0))
            _, lowest = cuts(known, min_p, mass, mass)
            maybe = mx.where(enough, maybe, known.high >= lowest)
        maybe &= top_p.maybe

        best = mx.max(known.high, axis=-1, keepdims=True)
        least_weights, most_weights = known.weights(best, draws.inverse_temperature)
        sums = Sums.of(
            mx.where(surely, least_weights, 0),
            mx.where(maybe, most_weights, 0),
            mx.concatenate([scored.ids, cast(mx.array, near.ids)], axis=-1),
            scored.tokens,
        )
        certain &= sums.decide(numbers_of(draws))
        if near.best_other is None:
            return certain
        # The filters must leave out what is not known.
        by_others = surely_left_out(near.best_other, known, others, mass, mx.array(0.0))
        if draws.most_top_k:
            by_others &= enough
        return certain & (top_p.drops_others | by_others)


def _changed(draws: Draws, change: Callable[[Draw], Draw]) -> Draws:
    """The draws with some filters taken out, which are not looked at in the arrays then."""
    settings = tuple(change(each) for each in draws.settings)
    return Draws(settings, draws.inputs)


class _Kept(NamedTuple):
    """What top-p makes of k states' logits that are known within bounds.

    Attributes:
        surely: (k, K) bool, which of the tokens looked at are kept in any case.
        maybe: (k, K) bool, which of them may be.
        n_surely: (k, 1), how many of the best tokens are kept, at least.
        drops_others: (k, 1) bool, whether all other tokens are left out.
    """

    surely: mx.array
    maybe: mx.array
    n_surely: mx.array
    drops_others: mx.array


def _masses(bounds: Bounds) -> tuple[mx.array, mx.array]:
    """The log of the least and of the most mass of all tokens, (k, 1) each."""
    least_scored, most_scored = bounds.scored.all.masses(bounds.scored_mass)
    least_others, most_others = bounds.unscored.masses(bounds.unscored_mass)
    least = mx.logaddexp(least_scored, least_others)
    most = mx.logaddexp(most_scored, most_others)
    return least - MASS_ROUNDING, most + MASS_ROUNDING


def _kept_in_float32(
    bounds: Bounds, draws: Draws, values: Interval, best_other: mx.array | None
) -> _Kept:
    """By the error of a sum: n terms lie within n · 2^-24 of it, in whichever order they are added.

    So the mass above a token is compared with top_p, give or take that share of 1 - top_p.

    Args:
        bounds: Of the logits.
        draws: Of k positions.
        values: The logits of the K tokens that are looked at.
        best_other: (k, 1), the highest that the logit of any other token may be; None: no other is.
    """
    alone = _changed(draws, lambda each: replace(each, min_p=0.0, top_k=0))
    error = FLOAT32 * bounds.clustered.vocab_size * (1 - draws.top_p) / draws.top_p
    # The margin is one of a logarithm.
    margin = mx.where(error < 0.5, 2 * error, mx.inf)
    least, most = _masses(bounds)
    high_cut, low_cut = cuts(values, alone, least - margin, most + margin)
    # Equal tokens have places of their own.
    surely = surely_kept(values.low, values.high, alone, high_cut, equals=False)
    drops_others = mx.array(True)
    if best_other is not None:
        drops_others = surely_left_out(best_other, values, alone, most + margin, mx.array(0.0))
    return _Kept(
        surely=surely,
        maybe=values.high >= low_cut,
        n_surely=surely.sum(axis=-1, keepdims=True),
        drops_others=drops_others,
    )


def _kept_in_16_bits(
    bounds: Bounds, draws: Draws, values: Interval, best_other: mx.array | None
) -> _Kept:
    """By the same sums of the least and of the most that the terms may be.

    The arguments are those of `_kept_in_float32`.
    """
    dtype = bounds.dtype
    n_tokens = bounds.clustered.vocab_size
    least_mass, most_mass = _masses(bounds)
    least_mass = least_mass.astype(dtype)
    most_mass = most_mass.astype(dtype)
    unscored = bounds.unscored.map(lambda array: array.flatten(1))
    low, high = _sorted(bounds.scored.all.beside(unscored), n_tokens)
    low = _log_probabilities(low, most_mass)
    high = _log_probabilities(high, least_mass)

    # An exponential is off by less than the spacing of its dtype.
    off = mx.finfo(dtype).eps
    smallest = SMALLEST_FLOAT32
    if dtype == mx.float16:
        smallest = SMALLEST_FLOAT16
    low_terms = mx.maximum(mx.exp(low) * (1 - off) - smallest, 0.0).astype(dtype)
    high_terms = (mx.exp(high) * (1 + off) + smallest).astype(dtype)
    # MLX rounds a number of Python that it compares with to the dtype.
    left_out = [[1 - each.top_p] for each in draws.settings]
    left = mx.array(left_out, mx.float32).astype(dtype)
    surely = mx.cumsum(low_terms, axis=-1) > left
    not_kept = mx.cumsum(high_terms, axis=-1) <= left

    # Sums need not rise from one place to the next, as a GPU adds blocks: from the one place on all
    # are kept, before the other none. Of equal values each may stand at any of their places.
    ranks = mx.arange(n_tokens)
    n_unsure = mx.max(mx.where(surely, -1, ranks), axis=-1, keepdims=True) + 1
    n_left_out = mx.min(mx.where(not_kept, n_tokens, ranks), axis=-1, keepdims=True)
    last_unsure = mx.take_along_axis(high, mx.maximum(n_unsure - 1, 0), axis=-1)
    last_unsure = mx.where(n_unsure == 0, -mx.inf, last_unsure)
    first_kept = mx.take_along_axis(low, mx.minimum(n_left_out, n_tokens - 1), axis=-1)
    drops_others = mx.array(True)
    if best_other is not None:
        drops_others = _log_probabilities(best_other, least_mass) < first_kept
    return _Kept(
        surely=_log_probabilities(values.low, most_mass) > last_unsure,
        maybe=_log_probabilities(values.high, least_mass) >= first_kept,
        n_surely=n_tokens - n_unsure,
        drops_others=drops_others,
    )


def _sorted(values: Interval, n_tokens: int) -> tuple[mx.array, mx.array]:
    """The least and the most of the highest ``n_tokens`` logits (k, K), each in rising order.

    The others stand for no tokens: those that are scored, or padded, have the lowest value.
    """
    low = mx.sort(values.low, axis=-1)
    high = mx.sort(values.high, axis=-1)
    return low[:, -n_tokens:], high[:, -n_tokens:]


def _log_probabilities(logits: mx.array, mass: mx.array) -> mx.array:
    """The log-probabilities of logits, rounded as mlx-lm rounds them, in float32."""
    return (logits.astype(mass.dtype) - mass).astype(mx.float32)
