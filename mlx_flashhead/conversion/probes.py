"""The number of clusters for the bare head: the fewest that keep the dense head's answers.

The choice is made on held-out positions of all kinds of text. The agreement must reach its goal at
the end of a 95 % confidence interval, since few positions may reach it by luck. Texts of other
authors are harder than held-out parts of the same documents, so the mean KL must be half of its
goal (docs/how-it-works.md). `differences.py` chooses for the check.
"""

import numpy as np

from .differences import StepBytes
from .measures import AGREEMENT, KL, PositionMeasures

CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %
PROBES_MULTIPLE = 8  # numbers of probes are multiples of it
UNSEEN = 2.0  # KL of unseen texts relative to held-out positions
GRID_STEP = 1.15  # greatest ratio of two neighbouring numbers of probes
MOST_BYTES = 0.25  # read per token, relative to the dense head


def probe_grid(n_clusters: int, largest: int) -> list[int]:
    """The numbers of probes to try, up to about ``largest``: multiples of 8, or all C clusters."""
    grid = [PROBES_MULTIPLE]
    while grid[-1] < largest:
        step = int(grid[-1] * (GRID_STEP - 1)) // PROBES_MULTIPLE * PROBES_MULTIPLE
        grid.append(grid[-1] + max(step, PROBES_MULTIPLE))
    return sorted({min(n_probes, n_clusters) for n_probes in grid})


def choose_probes(
    found: PositionMeasures,
    agreement_goal: float,
    kl_goal: float,
    nbytes: StepBytes,
    n_clusters: int,
) -> tuple[int, str]:
    """The fewest probes that reach the goals, or the most that the bytes allow, and why.

    The goals are a share of positions with the dense head's best token, and nats per position.
    """
    n_positions = found.values.shape[2]
    # the goal, or the bound that so few positions can show if all of them agree
    possible = min(agreement_goal, lower_bound(1.0, n_positions) - 1e-9)
    goals = (f"{100 * agreement_goal:g} % agreement", f"a KL of {kl_goal / UNSEEN:g} nats")
    n_probes, missed = 0, []
    for tried, values in zip(found.probe_counts, found.values, strict=True):
        if n_probes and nbytes.head(tried) > MOST_BYTES * nbytes.dense:
            break
        n_probes = tried
        agreement, kl = values[[AGREEMENT, KL]].mean(axis=1, dtype=np.float64)
        reached = (lower_bound(agreement, n_positions) >= possible, UNSEEN * kl <= kl_goal)
        missed = [goal for goal, is_reached in zip(goals, reached, strict=True) if not is_reached]
        if not missed:
            break
    scored = f"{n_probes:,} of {n_clusters:,} clusters per token"
    if not missed:
        words = " and ".join(goals)
        return n_probes, f"{scored} are the fewest that reach {words} on held-out text."
    return n_probes, (
        f"{scored} are too few to be sure of {' and '.join(missed)} on held-out text. More would "
        f"read over {100 * MOST_BYTES:g} % of the dense head's bytes."
    )


def lower_bound(share: float, n: int) -> float:
    """The lower end of Wilson's interval around a share of n positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))
