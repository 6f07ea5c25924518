"""Positions to calibrate on: hidden states with their next tokens and kinds of text.

The last quarter of each kind is held out: it chooses the probes and makes the report.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

HELD_OUT_SHARE = 1 / 4


@dataclass(frozen=True)
class Positions:
    """Hidden states with their next tokens and kinds of text."""

    states: np.ndarray  # (N, D) float32
    next_ids: np.ndarray  # (N,) int64, the token after each state
    kinds: np.ndarray  # (N,) int64, places in ``names``
    held_out: np.ndarray  # (N,) bool, positions that are not fitted on
    names: tuple[str, ...]  # of the kinds of text

    @classmethod
    def of_one_kind(cls, name: str, states: np.ndarray, next_ids: np.ndarray) -> "Positions":
        """States (N, D) and next tokens (N,) of one kind. Of two positions one is held out."""
        n_held_out = max(round(HELD_OUT_SHARE * len(states)), len(states) > 1)
        held_out = np.arange(len(states)) >= len(states) - n_held_out
        return cls(states, next_ids, np.zeros(len(states), np.int64), held_out, (name,))

    @classmethod
    def joined(cls, parts: Sequence["Positions"]) -> "Positions":
        """All positions of parts whose kinds have different names."""
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        return cls(
            np.concatenate([part.states for part in parts]),
            np.concatenate([part.next_ids for part in parts]),
            np.concatenate([part.kinds + n for part, n in zip(parts, starts, strict=False)]),
            np.concatenate([part.held_out for part in parts]),
            tuple(name for part in parts for name in part.names),
        )

    def __len__(self) -> int:
        return len(self.states)

    def parted(self) -> tuple["Positions", np.ndarray]:
        """The held-out positions, and the states (n, D) of the others."""
        chosen = self.held_out
        names = ("states", "next_ids", "kinds", "held_out")
        held_out = replace(self, **{name: getattr(self, name)[chosen] for name in names})
        return held_out, self.states[~chosen]
