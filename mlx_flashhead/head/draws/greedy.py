"""The token of the largest logit, of equal ones the lowest id."""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx

from ..margins import IN_16_BITS, merging_distance
from .bounds import Bounds
from .draw import NO_KEY, Draw, Draws

# A number above every id.
NO_TOKEN = 0xFFFFFFFF


@dataclass(frozen=True)
class Greedy(Draw):
    """Takes the best logit. NaN counts as the highest."""

    kernels: ClassVar[tuple[str, ...]] = ("sample", "screen", "certain")
    by_mass: ClassVar[bool] = False

    @staticmethod
    def choose(
        logits: mx.array,
        draws: Draws,
        token_ids: mx.array | None = None,
        others: mx.array | None = None,
    ) -> mx.array:
        """Takes the best of the tokens given: as :meth:`Draw.choose`."""
        return best_token(logits, token_ids)

    @staticmethod
    def certain(bounds: Bounds, draws: Draws) -> mx.array:
        """Returns whether each token's logit is above every other: as :meth:`Draw.certain`.

        Log-probabilities have a relative spacing, and rounding must not make it equal to another.
        """
        scored = bounds.scored
        epsilon = bounds.epsilon
        best_other = bounds.best_unscored
        if epsilon > IN_16_BITS:
            _, others = bounds.unscored.masses(bounds.unscored_mass)
        else:
            # This needs no pass over all logits.
            others = best_other + math.log(bounds.clustered.vocab_size)
        most = mx.logaddexp(bounds.scored_mass, others)
        of_scored = merging_distance(most, scored.second.logits, epsilon)
        of_others = merging_distance(most, best_other, epsilon)
        above_scored = scored.own.low - scored.second.high > of_scored
        above_others = scored.own.low - best_other > of_others
        return above_scored & above_others


@cache
def best_draws(n_positions: int) -> Draws:
    """The draws of positions that are all greedy."""
    return Draws.of([(Greedy(), NO_KEY)] * n_positions)


def best_token(values: mx.array, token_ids: mx.array | None = None) -> mx.array:
    """The token of the best value, or NaN, of equal ones the lowest id: (R, K) → (R,) uint32.

    Args:
        values: (R, K).
        token_ids: (R, K) uint32; None: 0 … K-1.
    """
    if token_ids is None:
        return mx.argmax(values, axis=-1)
    best = mx.max(values, axis=-1, keepdims=True)
    # Where one is NaN, no value equals the best.
    highest = (values == best) | mx.isnan(values)
    return mx.min(mx.where(highest, token_ids, mx.array(NO_TOKEN, mx.uint32)), axis=-1)
