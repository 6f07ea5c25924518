"""The number of clusters for the bare head: the fewest that keep the dense head's answers.

The choice is made on held-out positions of all kinds of text. The agreement must reach its goal at
the end of a 95 % confidence interval, since few positions may reach it by luck. Texts of other
authors are harder than held-out parts of the same documents, so the mean KL must be half of its
goal (docs/how-it-works.md). `differences.py` chooses for the check.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .measures import AGREEMENT, KL, PositionMeasures

CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %
PROBES_MULTIPLE = 8  # numbers of probes are multiples of it
UNSEEN = 2.0  # KL of unseen texts relative to held-out positions
GRID_STEP = 1.15  # greatest ratio of two neighbouring numbers of probes


@dataclass(frozen=True)
class Goals:
    """The goals of a choice of probes."""

    agreement: float = 0.998  # share of positions with the dense head's best token
    kl: float = 0.03  # from the dense head's distribution, nats per position
    bytes_share: float = 0.25  # at most: bytes read per token, relative to the dense head

    def in_words(self) -> tuple[str, str]:
        """What held-out positions must reach, as text: agreement and KL."""
        return f"{100 * self.agreement:g} % agreement", f"a KL of {self.kl / UNSEEN:g} nats"


@dataclass(frozen=True)
class Choice:
    """A number of probes, and what it does not reach since the bytes limit it."""

    n_probes: int
    goals: Goals
    missed: tuple[str, ...]  # goals, such as "99.8 % agreement"
    unshown: tuple[str, ...]  # the agreement, if so few positions cannot show it

    def in_words(self, n_clusters: int) -> str:
        """The choice as a sentence or two."""
        scored = f"{self.n_probes:,} of {n_clusters:,} clusters per token"
        if not (self.missed or self.unshown):
            goals = _joined(self.goals.in_words())
            return f"{scored} are the fewest that reach {goals} on held-out text."
        parts = []
        if self.missed:
            parts.append(f"miss {_joined(self.missed)}")
        if self.unshown:
            parts.append(
                f"reach {_joined(self.unshown)} on held-out text, on too few positions to be sure"
            )
        return (
            f"{scored} {' and '.join(parts)}. More would read over "
            f"{100 * self.goals.bytes_share:g} % of the dense head's bytes."
        )


def _joined(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def probe_grid(n_clusters: int, largest: int) -> list[int]:
    """The numbers of probes to try, up to about ``largest``: multiples of 8, or all C clusters."""
    grid = [PROBES_MULTIPLE]
    while grid[-1] < largest:
        step = int(grid[-1] * (GRID_STEP - 1)) // PROBES_MULTIPLE * PROBES_MULTIPLE
        grid.append(grid[-1] + max(step, PROBES_MULTIPLE))
    return sorted({min(n_probes, n_clusters) for n_probes in grid})


def choose_probes(
    found: PositionMeasures, goals: Goals, bytes_share: Callable[[int], float]
) -> Choice:
    """The fewest probes that reach the goals, or the most that the bytes allow.

    Args:
        found: Measures of one routing, at ascending numbers of probes.
        bytes_share: Number of probes → bytes read per token relative to the dense head.
    """
    n = found.values.shape[2]
    # the goal, or the bound that so few positions can show if all of them agree
    possible = min(goals.agreement, lower_bound(1.0, n) - 1e-9)
    words = goals.in_words()
    choice = None
    for n_probes, values in zip(found.probe_counts, found.values, strict=True):
        if choice is not None and bytes_share(n_probes) > goals.bytes_share:
            break
        agreement, kl = values[[AGREEMENT, KL]].mean(axis=1, dtype=np.float64)
        reached = (agreement >= goals.agreement, UNSEEN * kl <= goals.kl)
        shown = lower_bound(agreement, n) >= possible
        missed = tuple(word for word, ok in zip(words, reached, strict=True) if not ok)
        unshown = words[:1] if reached[0] and not shown else ()
        choice = Choice(n_probes, goals, missed, unshown)
        if not missed and not unshown:
            break
    assert choice is not None
    return choice


def lower_bound(share: float, n: int) -> float:
    """The lower end of Wilson's interval around a share of n positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))
