"""Logits that are known within bounds."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from .draw import log_mass

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
    def even(self) -> bool:
        """Whether all logits of a state may be equally far off."""
        return self.off.size == len(self.logits)

    def map(self, take: Callable[[mx.array], mx.array]) -> "Interval":
        """Some of the logits (k, K), as ``take`` picks them from an array."""
        off = self.off.reshape(-1, 1) if self.even else take(self.off)
        return Interval(take(self.logits), off)

    def masses(self) -> tuple[mx.array, mx.array]:
        """The least and the greatest log of the summed exponentials: (k, 1) each."""
        if self.even:
            mass = log_mass(self.logits.flatten(1))
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
