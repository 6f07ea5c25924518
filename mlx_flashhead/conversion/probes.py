"""The number of clusters for the bare head: the fewest that keep the dense head's answers.

The choice is made on held-out positions of all kinds of text, with the same weight for each kind.
The agreement must reach its goal at the end of a 95 % confidence interval, since few positions may
reach it by luck. Texts of other authors are harder than held-out parts of the same documents, so
the mean KL must be half of its goal (docs/how-it-works.md). `differences.py` chooses for the check.
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
    found: PositionMeasures,
    kinds: np.ndarray,
    goals: Goals,
    bytes_share: Callable[[int], float],
) -> Choice:
    """The fewest probes that reach the goals, or the most that the bytes allow.

    Args:
        found: Measures of one routing, at ascending numbers of probes.
        kinds: (N,) integers, the kind of text of each position.
        bytes_share: Number of probes → bytes read per token relative to the dense head.
    """
    weights = kind_weights(kinds)
    words = goals.in_words()
    choice = None
    for n_probes, values in zip(found.probe_counts, found.values, strict=True):
        if choice is not None and bytes_share(n_probes) > goals.bytes_share:
            break
        reached = (
            float(values[AGREEMENT] @ weights) >= goals.agreement,
            UNSEEN * float(values[KL] @ weights) <= goals.kl,
        )
        shown = lower_bound(values[AGREEMENT], weights) >= _possible(goals.agreement, weights)
        missed = tuple(word for word, ok in zip(words, reached, strict=True) if not ok)
        unshown = words[:1] if reached[0] and not shown else ()
        choice = Choice(n_probes, goals, missed, unshown)
        if not missed and not unshown:
            break
    assert choice is not None
    return choice


def kind_weights(kinds: np.ndarray) -> np.ndarray:
    """Weights of positions (N,) of sum 1, with the same weight for each kind.

    A kind with fewer positions than the mean weighs less in proportion, since it shows little.
    """
    _, place, sizes = np.unique(kinds, return_inverse=True, return_counts=True)
    shares = np.minimum(sizes, sizes.mean())
    return (shares / sizes)[place] / shares.sum()


def lower_bound(agree: np.ndarray, weights: np.ndarray) -> float:
    """The lower end of Wilson's interval around the share of ``agree`` (N,), weights of sum 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided, with Kish's effective number of positions.
    """
    return _wilson(float(agree @ weights), 1 / float(np.square(weights).sum()))


def _wilson(share: float, n: float) -> float:
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))


def _possible(target: float, weights: np.ndarray) -> float:
    """The target, or the bound that so few positions can show if all of them agree."""
    return min(target, _wilson(1.0, 1 / float(np.square(weights).sum())) - 1e-9)
