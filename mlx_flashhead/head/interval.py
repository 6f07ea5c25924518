"""Logits that are known within bounds."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from .draw import Draws, log_mass, threshold, thresholds
from .lowest_kept import kernel_is_used
from .margins import DRAW_SPACINGS, IN_16_BITS, MASS_MARGIN, MASS_ROUNDING

LOWEST = mx.finfo(mx.float32).min


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
        off = self.off.reshape(-1, 1) if self.even else take(self.off)
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
        """The least and the most that exp((logit - best) * scale) may be, likewise (k, …)."""
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
    """The scored tokens of k states. Their logits are the model's."""

    ids: mx.array  # (k, K) uint32
    tokens: mx.array  # (k, 1) uint32, the proposed ones
    own: Interval  # (k, 1), of these
    all: Interval  # (k, K)
    rest: Interval  # (k, K), the lowest value in the place of the proposed token
    second: Interval  # (k, 1), the best of the rest


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


def cuts(
    known: Interval, draws: Draws, log_least: mx.array, log_most: mx.array
) -> tuple[mx.array, mx.array]:
    """Where the filters cut if all logits are as high, and as low, as they may be.

    Logits of a state that may all be equally far off keep their order, and are sorted once.

    Args:
        known: The logits of K tokens, (k, K).
        draws: Of k rows.
        log_least: (k, 1), the log of the least mass of all tokens.
        log_most: (k, 1), that of the greatest.

    Returns:
        The lowest kept logits, (k, 1) each.
    """
    if not known.even or kernel_is_used():
        return threshold(known.high, draws, log_least), threshold(known.low, draws, log_most)
    off = known.off.reshape(-1, 1)
    high, low = thresholds(known.logits, draws, [log_least - off, log_most + off])
    return high + off, low - off


def surely_kept(low: mx.array, high: mx.array, draws: Draws, cut: mx.array) -> mx.array:
    """Returns which tokens the filters keep whatever the logits are within bounds: (k, K) bool.

    With all logits as high as they may be, the filters have a cut. A token is kept in any case if
    its lowest logit is above it. So is the token at the cut if no other one can come between: those
    that may lie above it are then the same as at the cut. A token that equals the last of a top-k
    is not kept in any case, as mlx-lm may leave it out.

    Args:
        low: The lowest that the logits of K tokens may be, (k, K) float32.
        high: The highest, (k, K) float32.
        draws: Of k rows.
        cut: (k, 1), that cut: a logit of ``high``, or what min-p asks for.
    """
    above = low >= cut
    if draws.most_top_k:
        above = mx.where(draws.top_k > 0, low > cut, above)
    at_cut = high == cut
    lowest_at_cut = mx.max(mx.where(at_cut, low, -mx.inf), axis=-1, keepdims=True)
    n_above = (high > cut).sum(axis=-1, keepdims=True)
    alone = at_cut & ((high > lowest_at_cut).sum(axis=-1, keepdims=True) == n_above + 1)
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
        draws: Of k rows.
        log_total: (k, 1), the log of the greatest mass of all tokens.
        more_over: (k, 1), the share of it that other tokens above the logit have at least.
    """
    low = known.low
    over = low > highest
    left_out = mx.array(False)
    if draws.any_top_p:
        share = mx.where(over, mx.exp(low - log_total), 0).sum(axis=-1, keepdims=True) + more_over
        left_out = (draws.top_p < 1) & (share >= draws.top_p * (1 + MASS_MARGIN))
    if draws.most_top_k:
        left_out |= (draws.top_k > 0) & (over.sum(axis=-1, keepdims=True) >= draws.top_k)
    if draws.any_min_p:
        left_out |= highest < mx.max(low, axis=-1, keepdims=True) + draws.log_min_p
    return left_out
