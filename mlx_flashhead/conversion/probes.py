"""The numbers of probes that follow from the measures, and the settings of verified decoding.

docs/how-it-works.md has the reasons for the numbers of probes.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..index.flash_head_config import Measured, VerificationSettings
from .measures import AGREEMENT, GAP, MASS, TAIL, PositionMeasures

# A one-sided confidence of 95 % has so many standard errors.
CONFIDENCE_Z = 1.645
# Numbers of probes are multiples of it.
PROBES_MULTIPLE = 8
# The greatest ratio of two neighbouring numbers of probes.
GRID_RATIO = 1.15
# The bytes that a token reads without verification, relative to the dense head.
MAX_BYTES = 0.25
# One verification has so many positions at most.
MAX_PENDING = 32

# The greatest ratio of the chosen number of probes to one that the risks are fitted on.
NEAR = 1.4
SLOPES = np.geomspace(0.25, 4.0, 33)
# The standard deviation of the log of the slope before anything is seen.
SLOPE_SPREAD = 0.3
# Where no position differs, one in twice as many may still.
UNSEEN_DIFFERENCE = 0.5
BISECTIONS = 60


@dataclass(frozen=True)
class BytesRead:
    """Bytes of weights that a decoding step reads.

    Attributes:
        centroids: All centroids.
        probe: The rows of one cluster.
        dense: All rows.
        body: All other layers.
    """

    centroids: int
    probe: float
    dense: float
    body: int = 0

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


def measured_probes(n_clusters: int, nbytes: BytesRead, n_probes: int | None = None) -> list[int]:
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
        added = int(grid[-1] * (GRID_RATIO - 1)) // PROBES_MULTIPLE * PROBES_MULTIPLE
        grid.append(grid[-1] + max(added, PROBES_MULTIPLE))
    counts = {min(count, n_clusters) for count in grid}
    if n_probes is not None:
        counts.add(n_probes)
    return sorted(counts)


def choose_unverified(measured: PositionMeasures, goal: float, nbytes: BytesRead) -> int:
    """The fewest probes whose proposals agree with the dense head's best token often enough.

    Args:
        measured: The measures, by number of probes.
        goal: The share of unseen positions that should agree.
        nbytes: What a step reads.

    Returns:
        The number of probes; where none reaches the goal, the most that the bytes allow.
    """
    n_positions = measured.values.shape[2]
    # It is the goal, or the bound that so few positions can show if all of them agree.
    possible = min(goal, lower_bound(1.0, n_positions) - 1e-9)
    means = measured.means()
    most = MAX_BYTES * nbytes.dense
    n_probes = means[0]["n_probes"]
    for figures in means:
        if nbytes.head(figures["n_probes"]) > most:
            break
        n_probes = figures["n_probes"]
        if lower_bound(figures["agreement"], n_positions) >= possible:
            break
    return n_probes


def lower_bound(share: float, n: int) -> float:
    """The lower end of Wilson's interval around a share of n positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))


def expected_bytes(measured: PositionMeasures, n_probes: int, nbytes: BytesRead) -> float:
    """Bytes per token of verified decoding, if proposals are rejected as often as measured.

    Args:
        measured: The measures, by number of probes.
        n_probes: One of the measured numbers of probes.
        nbytes: What a step reads.
    """
    means = next(figures for figures in measured.means() if figures["n_probes"] == n_probes)
    greedy_rejected = 1 - means["agreement"]
    sampled_rejected = 1 - means["mass"]
    return nbytes.verified(n_probes, (greedy_rejected + sampled_rejected) / 2)


def choose_verified(measured: PositionMeasures, nbytes: BytesRead) -> int:
    """The measured number of probes with the fewest expected bytes."""
    return min(measured.probe_counts, key=lambda n: expected_bytes(measured, n, nbytes))


def verification_settings(measured: PositionMeasures, n_probes: int) -> VerificationSettings:
    """The stored settings of verified decoding.

    Args:
        measured: The measures, by number of probes.
        n_probes: The number of probes near which the risk is fitted.

    Returns:
        ``by_probes``, the shares of positions with another proposal, and the ``risk`` of
        `head/operations.py`.
    """
    probes = np.array(measured.probe_counts)
    near = measured.values[(probes >= n_probes / NEAR) & (probes <= n_probes * NEAR)]
    gaps = near[:, GAP].ravel()
    differs = near[:, AGREEMENT].ravel() == 0
    # Elsewhere all clusters are scored.
    has_gap = np.isfinite(gaps)
    a, b = fit_greedy_risk(gaps[has_gap], differs[has_gap])
    estimated = np.exp(near[:, TAIL], dtype=np.float64).sum()
    unscored = (1 - near[:, MASS].astype(np.float64)).sum()
    scale = 1.0
    if estimated > 0:
        scale = float(unscored / estimated)
    by_probes: list[Measured] = []
    for means in measured.means():
        by_probes.append(
            {
                "n_probes": means["n_probes"],
                "greedy_differs": max(1 - means["agreement"], 0.0),
                "sampled_differs": max(1 - means["mass"], 0.0),
            }
        )
    return {"risk": {"greedy": [a, b], "sampled": scale}, "by_probes": by_probes}


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
    # 0 and 1 have no logarithm of themselves or of their rest.
    risk = np.clip(risk, 1e-12, 1 - 1e-6)
    likelihood = np.log(np.where(differs, risk, 1 - risk)).sum(axis=1)
    best = (likelihood - (np.log(SLOPES) / SLOPE_SPREAD) ** 2 / 2).argmax()
    return float(offset[best]), float(SLOPES[best])
