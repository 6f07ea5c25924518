"""The draw of mlx-lm's samplers at one position: ``mx.random.categorical``, by a uniform number.

    token = the first one, in the order of ids, with (weights up to it) > number · (all weights)
    weight = exp(logit / temperature) of a kept token;  number: uniform between 0 and 1

Source: ``categorical_inverse_cdf`` in MLX's random.cpp, since 0.32.1 for logits (1, V).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import mlx.core as mx

from ..margins import DRAW_SPACINGS, EXP_UNITS, IN_16_BITS, MASS_ROUNDING, SUM_ROUNDING
from .bounds import Bounds, Interval, log_mass, nearest
from .draw import Draw, Draws
from .filters import cuts, surely_kept, surely_left_out, threshold

# So many clusters that were not scored are looked at token by token, if filters may keep some.
NEAREST = 64


@dataclass(frozen=True)
class InverseCDF(Draw):
    """Draws by a number, whose bits are a position's key: (bits of a float32, 0)."""

    whole_mass: ClassVar[bool] = True

    @staticmethod
    def choose(
        logits: mx.array,
        draws: Draws,
        token_ids: mx.array | None = None,
        others: mx.array | None = None,
    ) -> mx.array:
        """Draws a token at each position: as :meth:`Draw.choose`."""
        if token_ids is None:
            ids = mx.arange(logits.shape[-1], dtype=mx.uint32)
            token_ids = mx.broadcast_to(ids, logits.shape)
        kept = logits
        if draws.filters:
            total = None
            if others is not None:
                total = mx.logaddexp(log_mass(logits), others)
            cut = threshold(logits, draws, total)
            kept = mx.where(logits >= cut, logits, -mx.inf)
        best = mx.max(logits, axis=-1, keepdims=True)
        weights = mx.exp((kept - best) * draws.inverse_temperature)
        order = mx.argsort(token_ids, axis=-1)
        in_order = mx.take_along_axis(weights, order, axis=-1)
        sums = mx.cumsum(in_order, axis=-1)
        total = sums[:, -1:]
        below = (sums <= numbers_of(draws) * total) & (sums < total)
        n_below = below.sum(axis=-1, keepdims=True)
        drawn = mx.take_along_axis(order, n_below, axis=-1)
        return mx.take_along_axis(token_ids, drawn, axis=-1)[:, 0]

    @staticmethod
    def certain(bounds: Bounds, draws: Draws) -> mx.array:
        """Returns whether each token is drawn whatever the logits are: as :meth:`Draw.certain`.

        It is if the tokens with lower ids weigh no more than the number's share of all, and with
        the token itself more. Within bounds of the weights the first holds in any case if it does
        when lower ids weigh as much as they may and the rest as little, and the second if it does
        when higher ids weigh as much as they may and the rest as little.
        """
        scored = bounds.scored
        mass = mx.logaddexp(bounds.scored_mass, bounds.unscored_mass)
        known = as_mlx_lm_draws(scored.all, mass, bounds.epsilon)
        others = as_mlx_lm_draws(bounds.unscored, mass[..., None], bounds.epsilon)
        if draws.filters:
            return _certain_of_kept(bounds, known, others, draws)
        known = _sorted_once(known, bounds.epsilon)
        inverse = draws.inverse_temperature
        best_scored = mx.max(known.high, axis=-1, keepdims=True)
        best_other = mx.max(others.highest, axis=-1, keepdims=True)
        best = mx.maximum(best_scored, best_other)
        least, most = known.weights(best, inverse)
        sums = Sums.of(least, most, scored.ids, scored.tokens)
        least, most = others.weights(best[..., None], inverse[..., None])
        ids = bounds.clustered.token_ids.reshape(1, -1)
        more = Sums.of(least.flatten(1), most.flatten(1), ids, scored.tokens)
        return sums.beside(more).decide(numbers_of(draws))


def numbers_of(draws: Draws) -> mx.array:
    """The uniform numbers of the positions, (R, 1) float32."""
    return draws.keys[:, :1].view(mx.float32)


def as_mlx_lm_draws(values: Interval, mass: mx.array, epsilon: float) -> Interval:
    """The logits as bounds of what mlx-lm draws from, in nats at temperature 1.

    These are log-probabilities in the model's dtype, times 1 / temperature in it.

    Args:
        values: The model's logits.
        mass: The log of the mass of all tokens, of a shape that broadcasts.
        epsilon: The relative spacing of the log-probabilities.
    """
    if epsilon < IN_16_BITS:
        return Interval(values.logits, values.off + MASS_ROUNDING)
    spacing = DRAW_SPACINGS * epsilon * (mx.abs(values.logits - mass) + 1)
    return Interval(values.logits, values.off + spacing + MASS_ROUNDING)


def _sorted_once(known: Interval, epsilon: float) -> Interval:
    """Logits that are equally far off, in float32: one order, one exponential for both ends."""
    return known.evenly() if epsilon < IN_16_BITS else known


def _certain_of_kept(bounds: Bounds, known: Interval, others: Interval, draws: Draws) -> mx.array:
    """Which proposals are certain where filters leave tokens out, and may keep some not scored.

    Args:
        bounds: Of the model's logits.
        known: Bounds of what is drawn from, of the scored tokens (k, K).
        others: Bounds of what is drawn from, of the other tokens (k, C, n).
        draws: Of k positions.
    """
    scored = bounds.scored
    least_scored, most_scored = known.masses(bounds.scored_mass)
    least_others, most_others = others.masses(bounds.unscored_mass)
    least = mx.logaddexp(least_scored, least_others)
    most = mx.logaddexp(most_scored, most_others)
    near = nearest(bounds.clustered, others, NEAREST)
    known = _sorted_once(known.beside(near.logits), bounds.epsilon)
    high_cut, low_cut = cuts(known, draws, least, most)
    surely = surely_kept(known.low, known.high, draws, high_cut)
    maybe = known.high >= low_cut
    best = mx.max(known.high, axis=-1, keepdims=True)
    least_weights, most_weights = known.weights(best, draws.inverse_temperature)
    sums = Sums.of(
        mx.where(surely, least_weights, 0),
        mx.where(maybe, most_weights, 0),
        mx.concatenate([scored.ids, cast(mx.array, near.ids)], axis=-1),
        scored.tokens,
    )
    certain = sums.decide(numbers_of(draws))
    if near.best_other is None:
        return certain
    # The filters must leave out what is not known.
    left_out = surely_left_out(near.best_other, known, draws, most, mx.array(0.0))
    return certain & left_out


class Sums(NamedTuple):
    """Sums of the weights of tokens: (k, 1) each.

    Attributes:
        lower_most: Of the tokens with lower ids than the proposed one, the most.
        if_lower: Of all tokens, if these weigh the most and the others the least.
        to_own_least: Of the lower ids and the proposed one, the least.
        if_higher: Of all tokens, if these weigh the least and the higher ids the most.
        most: Of all tokens, the most.
        small: The most that additions of the weights can lose.
    """

    lower_most: mx.array
    if_lower: mx.array
    to_own_least: mx.array
    if_higher: mx.array
    most: mx.array
    small: mx.array

    @classmethod
    def of(cls, at_least: mx.array, at_most: mx.array, ids: mx.array, tokens: mx.array) -> "Sums":
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

    def beside(self, other: "Sums") -> "Sums":
        """These sums with those of other tokens added."""
        return Sums._make(map(mx.add, self, other))

    def decide(self, numbers: mx.array) -> mx.array:
        """Whether the numbers (k, 1) fall in the tokens' shares in any case: (k, 1) bool."""
        lost = self.small + SUM_ROUNDING * (EXP_UNITS + 1) * self.most
        reached = self.lower_most + lost <= numbers * self.if_lower
        not_passed = numbers * self.if_higher + lost < self.to_own_least
        return reached & not_passed
