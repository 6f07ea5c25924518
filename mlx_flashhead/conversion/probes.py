"""The numbers of probes that follow from the measures, and the settings of verified decoding.

docs/how-it-works.md has the reasons for the numbers of probes.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..index.settings import Measured, Verification
from .measures import AGREEMENT, GAP, MASS, TAIL, PositionMeasures

CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %
PROBES_MULTIPLE = 8  # numbers of probes are multiples of it
GRID_STEP = 1.15  # greatest ratio of two neighbouring numbers of probes
MAX_BYTES = 0.25  # read per token without verification, relative to the dense head
MAX_PENDING = 32  # positions of one verification

NEAR = 1.4  # greatest ratio of the chosen number of probes to one that the risks are fitted on
SLOPES = np.geomspace(0.25, 4.0, 33)
SLOPE_SPREAD = 0.3  # standard deviation of the log of the slope before anything is seen
UNSEEN_DIFFERENCE = 0.5  # positions: where none differs, one in twice as many may still
BISECTIONS = 60


@dataclass(frozen=True)
class StepBytes:
    """Bytes of weights that a decoding step reads."""

    centroids: int
    probe: float  # the rows of one cluster
    dense: float  # all rows
    body: int = 0  # all other layers

    def head(self, n_probes: int) -> float:
        """The bytes of a FlashHead: of the centroids and the rows of the scored clusters."""
        return self.centroids + n_probes * self.probe

    def share(self, n_probes: int) -> float:
        """The bytes of `head`, relative to those of the dense head."""
        return self.head(n_probes) / self.dense

    def verified(self, n_probes: int, rejected: float) -> float:
        """Expected bytes per token of verified decoding.

        The number of positions per verification is the best one. docs/how-it-works.md has the
        formula.

        Args:
            n_probes: Clusters scored per token.
            rejected: The share of proposals that are rejected.
        """
        step = self.body + self.head(n_probes)
        k = math.sqrt(2 * self.dense / max(rejected * step, 1e-9))
        k = min(max(k, 1.0), MAX_PENDING)
        return step * (1 + rejected * (k + 1) / 2) + self.dense / k


def measured_probes(n_clusters: int, nbytes: StepBytes, n_probes: int | None = None) -> list[int]:
    """The numbers of probes to measure: those that the bytes allow, and a chosen one.

    They are multiples of 8, or all clusters.

    Args:
        n_clusters: Number of clusters C.
        nbytes: What a step reads.
        n_probes: The chosen number, if there is one.
    """
    largest = int((MAX_BYTES * nbytes.dense - nbytes.centroids) / nbytes.probe)
    grid = [PROBES_MULTIPLE]
    while grid[-1] < largest:
        step = int(grid[-1] * (GRID_STEP - 1)) // PROBES_MULTIPLE * PROBES_MULTIPLE
        grid.append(grid[-1] + max(step, PROBES_MULTIPLE))
    counts = {min(count, n_clusters) for count in grid}
    if n_probes is not None:
        counts.add(n_probes)
    return sorted(counts)


def choose_unverified(measured: PositionMeasures, goal: float, nbytes: StepBytes) -> int:
    """The fewest probes whose proposals agree with the dense head's best token often enough.

    Args:
        measured: The measures, by number of probes.
        goal: The share of unseen positions that should agree.
        nbytes: What a step reads.

    Returns:
        The number of probes; where none reaches the goal, the most that the bytes allow.
    """
    n_positions = measured.values.shape[2]
    # the goal, or the bound that so few positions can show if all of them agree
    possible = min(goal, lower_bound(1.0, n_positions) - 1e-9)
    means = measured.means()
    most = MAX_BYTES * nbytes.dense
    allowed = [row for row in means if nbytes.head(row["n_probes"]) <= most] or means[:1]
    for row in allowed:
        if lower_bound(row["agreement"], n_positions) >= possible:
            return row["n_probes"]
    return allowed[-1]["n_probes"]


def lower_bound(share: float, n: int) -> float:
    """The lower end of Wilson's interval around a share of n positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))


def expected_bytes(measured: PositionMeasures, n_probes: int, nbytes: StepBytes) -> float:
    """Bytes per token of verified decoding, if proposals are rejected as often as measured.

    Args:
        measured: The measures, by number of probes.
        n_probes: One of the measured numbers of probes.
        nbytes: What a step reads.
    """
    means = next(row for row in measured.means() if row["n_probes"] == n_probes)
    # of greedy proposals, and at temperature 1
    return nbytes.verified(n_probes, ((1 - means["agreement"]) + (1 - means["mass"])) / 2)


def choose_verified(measured: PositionMeasures, nbytes: StepBytes) -> int:
    """The measured number of probes with the fewest expected bytes."""
    return min(measured.probe_counts, key=lambda n: expected_bytes(measured, n, nbytes))


def verification_settings(measured: PositionMeasures, n_probes: int) -> Verification:
    """The stored settings of verified decoding.

    Args:
        measured: The measures, by number of probes.
        n_probes: The number of probes near which the risk is fitted.

    Returns:
        ``by_probes``, the shares of positions with another proposal, and the ``risk`` of
        `head/steps.py`.
    """
    probes = np.array(measured.probe_counts)
    near = measured.values[(probes >= n_probes / NEAR) & (probes <= n_probes * NEAR)]
    gaps = near[:, GAP].ravel()
    differs = near[:, AGREEMENT].ravel() == 0
    left = np.isfinite(gaps)  # elsewhere all clusters are scored
    a, b = fit_greedy_risk(gaps[left], differs[left])
    estimated = np.exp(near[:, TAIL], dtype=np.float64).sum()
    unscored = (1 - near[:, MASS].astype(np.float64)).sum()
    scale = float(unscored / estimated) if estimated > 0 else 1.0
    rows: list[Measured] = [
        {
            "n_probes": row["n_probes"],
            "greedy_differs": max(1 - row["agreement"], 0.0),
            "sampled_differs": max(1 - row["mass"], 0.0),
        }
        for row in measured.means()
    ]
    return {"risk": {"greedy": [a, b], "sampled": scale}, "by_probes": rows}


def fit_greedy_risk(gaps: np.ndarray, differs: np.ndarray) -> tuple[float, float]:
    """The most likely a and b of the risk min(1, exp(a - b · gap)) of another greedy proposal.

    For each slope b the risks add up to the differences and half of one more, since none seen is
    not none.

    Args:
        gaps: The gaps of positions (N,).
        differs: Whether the greedy proposal differs there (N,).
    """
    if not len(gaps):
        return 0.0, 1.0
    wanted = min(differs.sum() + UNSEEN_DIFFERENCE, len(gaps) / 2)
    falling = -SLOPES[:, None] * gaps.astype(np.float64)
    low = -falling.max(axis=1) - 50.0
    high = -falling.min(axis=1) + 1.0
    for _ in range(BISECTIONS):
        offset = (low + high) / 2
        risk = np.exp(np.minimum(offset[:, None] + falling, 0))
        above = risk.sum(axis=1) > wanted
        low = np.where(above, low, offset)
        high = np.where(above, offset, high)
    risk = np.clip(risk, 1e-12, 1 - 1e-6)  # for the logarithms
    likelihood = np.log(np.where(differs, risk, 1 - risk)).sum(axis=1)
    best = (likelihood - (np.log(SLOPES) / SLOPE_SPREAD) ** 2 / 2).argmax()
    return float(offset[best]), float(SLOPES[best])
