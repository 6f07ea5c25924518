"""Numbers of probes: for verified decoding those of the fewest expected bytes, without verification
the fewest that agree with the dense head on held-out positions. docs/how-it-works.md has the
reasons."""

import math
from dataclasses import dataclass

import numpy as np

from .measures import AGREEMENT, GAP, MASS, TAIL, PositionMeasures

CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %
PROBES_MULTIPLE = 8  # numbers of probes are multiples of it
GRID_STEP = 1.15  # greatest ratio of two neighbouring numbers of probes
MAX_BYTES = 0.25  # read per token, relative to the dense head

MAX_PENDING = 32  # positions of one verification
NEAR = 1.4  # greatest ratio of the chosen number of probes to one that the risks are fitted on
SLOPES = np.geomspace(0.25, 4.0, 33)
SLOPE_SPREAD = 0.3  # standard deviation of the log of the slope before anything is seen
UNSEEN_DIFFERENCE = 0.5  # positions: where none differs, one in twice as many may still
LEAST_RISK, GREATEST_RISK = 1e-12, 1 - 1e-6


@dataclass(frozen=True)
class StepBytes:
    """Bytes of weights that a decoding step reads."""

    centroids: int
    probe: float  # the rows of one cluster
    dense: int  # all rows
    body: int = 0  # all other layers

    def head(self, n_probes: int) -> float:
        return self.centroids + n_probes * self.probe

    def verified(self, n_probes: int, share: float) -> float:
        """Expected bytes per token of verified decoding, if that share of proposals is rejected,
        with the best number of positions per verification. docs/how-it-works.md has the formula."""
        step = self.body + self.head(n_probes)
        k = math.sqrt(2 * self.dense / max(share * step, 1e-9))
        k = min(max(k, 1.0), MAX_PENDING)
        return step * (1 + share * (k + 1) / 2) + self.dense / k


def probe_grid(n_clusters: int, largest: int) -> list[int]:
    """The numbers of probes to try, up to about ``largest``: multiples of 8, or all C clusters."""
    grid = [PROBES_MULTIPLE]
    while grid[-1] < largest:
        step = int(grid[-1] * (GRID_STEP - 1)) // PROBES_MULTIPLE * PROBES_MULTIPLE
        grid.append(grid[-1] + max(step, PROBES_MULTIPLE))
    return sorted({min(n_probes, n_clusters) for n_probes in grid})


def choose_unverified(found: PositionMeasures, goal: float, nbytes: StepBytes) -> int:
    """The fewest probes whose proposals agree with the dense head's best token at the ``goal``, a
    share of unseen positions; or the most that the bytes allow."""
    n_positions = found.values.shape[2]
    # the goal, or the bound that so few positions can show if all of them agree
    possible = min(goal, lower_bound(1.0, n_positions) - 1e-9)
    chosen = found.probe_counts[0]
    for n_probes, values in zip(found.probe_counts, found.values, strict=True):
        if nbytes.head(n_probes) > MAX_BYTES * nbytes.dense:
            break
        chosen = n_probes
        if lower_bound(float(values[AGREEMENT].mean(dtype=np.float64)), n_positions) >= possible:
            break
    return chosen


def lower_bound(share: float, n: int) -> float:
    """The lower end of Wilson's interval around a share of n positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))


def choose_verified(found: PositionMeasures, nbytes: StepBytes) -> int:
    """The probes of the fewest expected bytes per token of verified decoding."""
    shares = (_shares_that_differ(found).mean(axis=0)).tolist()
    expected = [
        nbytes.verified(n, share) for n, share in zip(found.probe_counts, shares, strict=True)
    ]
    return found.probe_counts[int(np.argmin(expected))]


def verification_settings(found: PositionMeasures, n_probes: int) -> dict:
    """The stored settings of verified decoding: shares of positions with another proposal
    ``by_probes``, and the ``risk`` of `head/steps.py` near ``n_probes``."""
    probes = np.array(found.probe_counts)
    near = found.values[(probes >= n_probes / NEAR) & (probes <= n_probes * NEAR)]
    gaps, differs = near[:, GAP].ravel(), near[:, AGREEMENT].ravel() == 0
    left = np.isfinite(gaps)  # elsewhere all clusters are scored
    estimated = np.exp(near[:, TAIL], dtype=np.float64).sum()
    unscored = (1 - near[:, MASS].astype(np.float64)).sum()
    greedy, sampled = _shares_that_differ(found).clip(0.0).tolist()
    return {
        "risk": {
            "greedy": list(fit_greedy_risk(gaps[left], differs[left])),
            "sampled": float(unscored / estimated) if estimated > 0 else 1.0,
        },
        "by_probes": [
            {"n_probes": n, "greedy_differs": g, "sampled_differs": s}
            for n, g, s in zip(found.probe_counts, greedy, sampled, strict=True)
        ],
    }


def _shares_that_differ(found: PositionMeasures) -> np.ndarray:
    """Shares (2, P) of positions with another proposal: greedy, and sampled at temperature 1."""
    return 1 - found.values[:, [AGREEMENT, MASS]].mean(axis=2, dtype=np.float64).T


def fit_greedy_risk(gaps: np.ndarray, differs: np.ndarray) -> tuple[float, float]:
    """The most likely a and b of the risk min(1, exp(a - b · gap)). For each slope b the risks add
    up to the differences and half of one more, since none seen is not none."""
    if not len(gaps):
        return 0.0, 1.0
    wanted = min(differs.sum() + UNSEEN_DIFFERENCE, len(gaps) / 2)
    fits = []
    for slope in SLOPES:
        falling = -slope * gaps.astype(np.float64)
        low, high = -falling.max() - 50.0, -falling.min() + 1.0
        for _ in range(60):
            offset = (low + high) / 2
            if np.exp(np.minimum(offset + falling, 0)).sum() > wanted:
                high = offset
            else:
                low = offset
        risk = np.clip(np.exp(np.minimum(offset + falling, 0)), LEAST_RISK, GREATEST_RISK)
        likelihood = np.log(np.where(differs, risk, 1 - risk)).sum()
        likelihood -= (math.log(slope) / SLOPE_SPREAD) ** 2 / 2
        fits.append((likelihood, float(offset), float(slope)))
    return max(fits)[1:]
