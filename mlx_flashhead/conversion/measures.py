"""How close retrieval comes to the dense head on held-out states, the numbers of probes that
follow, and the report.

- agreement: share of positions whose proposed token is the dense head's best.
- coverage: share of positions whose true next token is among the candidates.
- mass: probability, under the dense head, of the candidates.
- KL: mean divergence of the distribution with the tail from the dense one, in nats.
- perplexity: of the true next tokens, under the distribution with the tail.
- gap, tail: the best candidate's logit less the best score of an unscored cluster, and the log of
  the estimated share of the unscored tokens.

The number of probes for verified decoding is the one of the fewest expected bytes, without
verification the fewest that agree with the dense head. docs/how-it-works.md has the reasons.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..common.tables import megabytes, percent
from ..head.steps import MARGIN_SHARE
from ..index.settings import FlashHeadConfig
from . import Step, Steps

CHUNK_STATES, CHUNK_LOGITS = 32, 1 << 22  # at once, which bounds memory and the time of a step
LEAST_LOGIT = np.float32(-1e30)
GREATEST_TAIL = 100.0  # of an estimate over the best logit: forced clusters have a huge score
# Places of a position's measures.
AGREEMENT, COVERAGE, MASS, KL, NLL, GAP, TAIL = range(7)

CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %
PROBES_MULTIPLE = 8  # numbers of probes are multiples of it
GRID_STEP = 1.15  # greatest ratio of two neighbouring numbers of probes
MAX_BYTES = 0.25  # read per token without verification, relative to the dense head
MAX_PENDING = 32  # positions of one verification

NEAR = 1.4  # greatest ratio of the chosen number of probes to one that the risks are fitted on
SLOPES = np.geomspace(0.25, 4.0, 33)
SLOPE_SPREAD = 0.3  # standard deviation of the log of the slope before anything is seen
UNSEEN_DIFFERENCE = 0.5  # positions: where none differs, one in twice as many may still
LEAST_RISK, GREATEST_RISK = 1e-12, 1 - 1e-6
RECORDED_AT, RECORDED_POSITIONS = (0.5, 1.0, 2.0), 512  # risks for the tuning, at these shares
RISK_UNITS = 10_000  # in a risk of 1, as they are recorded

Products = Callable[[np.ndarray], np.ndarray]


class Measures(NamedTuple):
    n_probes: int
    agreement: float  # share of positions, as the next
    coverage: float
    mass: float
    kl: float  # nats per position
    perplexity: float  # with the tail


@dataclass(frozen=True)
class PositionMeasures:
    """Measures at each of N positions, for each of P numbers of probes."""

    probe_counts: Sequence[int]
    values: np.ndarray  # (P, 7, N) float32, by the places above
    dense_nll: np.ndarray  # (N,) float64, of the true next tokens under the dense head

    def means(self) -> list[Measures]:
        """The measures over all positions, by number of probes."""
        means = self.values[:, :GAP].mean(axis=2, dtype=np.float64).tolist()
        rows = zip(self.probe_counts, means, strict=True)
        return [Measures._make([n, *shares, _exp(nll)]) for n, (*shares, nll) in rows]

    def rejected_shares(self) -> np.ndarray:
        """Shares (2, P) of positions with another proposal: greedy, and at temperature 1."""
        return 1 - self.values[:, [AGREEMENT, MASS]].mean(axis=2, dtype=np.float64).T

    def rejected(self, n_probes: int) -> float:
        """The mean of both at a measured number of probes."""
        return float(self.rejected_shares().mean(axis=0)[self.probe_counts.index(n_probes)])

    def dense_perplexity(self) -> float:
        """Of the true next tokens, over all positions."""
        return _exp(self.dense_nll.mean())


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def measure_positions(
    states: np.ndarray,
    logits_of: Products,
    token_ids: np.ndarray,
    scores_of: Products,
    tail_offset: np.ndarray,
    probe_counts: Sequence[int],
    next_ids: np.ndarray,
) -> Steps[PositionMeasures]:
    """Measures a way to choose clusters at each number of probes (1 … C) and each state (N, D).

    ``logits_of`` gives dense logits (n, D) → (n, V), ``scores_of`` scores of clusters (n, C),
    float32. ``tail_offset`` (C,) makes a score the logit of a token. ``token_ids`` are V in padded
    slots.
    """
    size = max(1, min(CHUNK_STATES, CHUNK_LOGITS // token_ids.size))
    values = np.empty((len(probe_counts), 7, len(states)), np.float32)
    dense_nll = np.empty(len(states))
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        chunk = states[part]
        logits, scores = logits_of(chunk), scores_of(chunk)
        values[:, :, part], dense_nll[part] = _compare(
            logits, token_ids, scores, tail_offset, np.array(probe_counts), next_ids[part]
        )
        yield Step("Measuring", start + len(chunk), len(states), "position")
    return PositionMeasures(probe_counts, values, dense_nll)


def _compare(
    logits: np.ndarray,
    token_ids: np.ndarray,
    scores: np.ndarray,
    tail_offset: np.ndarray,
    probes: np.ndarray,
    truth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """All measures (P, 7, n) from dense logits (n, V) and scores (n, C) of the clusters, and the
    dense head's negative log-likelihoods (n,) of the true tokens."""
    (n_rows, vocab_size), n_clusters = logits.shape, len(token_ids)
    rows = np.arange(n_rows)
    flat = token_ids.reshape(-1).astype(np.int64)
    real = flat < vocab_size
    cluster_of = np.empty(vocab_size, np.int64)
    cluster_of[flat[real]] = np.flatnonzero(real) // token_ids.shape[1]
    sizes = (token_ids < vocab_size).sum(1)
    # a padded slot reads a column of -inf and adds nothing to a sum
    padded = np.concatenate([logits, np.full((n_rows, 1), -np.inf, logits.dtype)], axis=1)
    blocks = padded[:, flat].reshape(n_rows, *token_ids.shape)
    best_of = blocks.max(-1)  # (n, C), as what follows
    top = best_of.max(-1)
    blocks -= top[:, None, None]
    weights = np.exp(blocks)
    cluster_sum = weights.sum(-1, dtype=np.float64)
    norm = cluster_sum.sum(-1)
    top = top.astype(np.float64)
    mass = cluster_sum / norm[:, None]  # probability of each cluster
    weights *= np.maximum(blocks, LEAST_LOGIT, out=blocks)  # 0 times -inf would be NaN
    mean_logit = weights.sum(-1, dtype=np.float64) / norm[:, None]  # sum of P_v (l_v - top)

    listed = min(int(probes.max()) + 1, n_clusters)  # one more, the best that is not scored
    order = np.argpartition(-scores, listed - 1, axis=1)[:, :listed]
    order = np.take_along_axis(
        order, np.argsort(-np.take_along_axis(scores, order, 1), axis=1, kind="stable"), 1
    )

    def scored(values: np.ndarray) -> np.ndarray:
        """Sums (n, P) of values (n, C) over the scored clusters."""
        return np.take_along_axis(values, order, 1).cumsum(1)[:, probes - 1]

    def holds(token: np.ndarray) -> np.ndarray:
        """Whether a token of each state is scored, (n, P)."""
        own = scores[rows, cluster_of[token]][:, None]
        return (scores > own).sum(1)[:, None] < probes

    tail = np.minimum((scores + tail_offset).astype(np.float64) - top[:, None], GREATEST_TAIL)
    weight = sizes * np.exp(tail)
    moved = mean_logit - mass * tail
    best = np.maximum.accumulate(np.take_along_axis(best_of, order, 1), 1)[:, probes - 1]
    best = best.astype(np.float64)
    total = scored(cluster_sum)
    unscored = np.maximum(weight.sum(1)[:, None] - scored(weight), 0.0)
    log_total = np.log(total + unscored)
    divergence = moved.sum(1)[:, None] - scored(moved)
    # the best score among the unscored clusters; none is left where all are scored
    next_best = np.full(best.shape, -np.inf)
    some = probes < n_clusters
    next_best[:, some] = np.take_along_axis(scores, order, 1)[:, probes[some]]
    cap = best - np.maximum(1.0, np.abs(best) * MARGIN_SHARE)  # of an estimate, as in the head
    for i, j in np.argwhere(next_best + tail_offset.max() > cap):
        left = np.ones(n_clusters, bool)
        left[order[i, : probes[j]]] = False
        capped = np.minimum(tail[i, left], cap[i, j] - top[i])
        log_total[i, j] = np.log(total[i, j] + sizes[left] @ np.exp(capped))
        divergence[i, j] = (mean_logit[i, left] - mass[i, left] * capped).sum()

    own = logits[rows, truth].astype(np.float64) - top
    estimate = np.minimum(tail[rows, cluster_of[truth]][:, None], cap - top[:, None])
    compared = np.empty((7, *best.shape))
    compared[AGREEMENT] = holds(logits.argmax(1))
    compared[COVERAGE] = holds(truth)
    compared[MASS] = np.minimum(scored(mass), 1.0)
    # sum over v of P_v (log P_v - log Q_v); probed tokens share their logit with the dense head
    compared[KL] = log_total - np.log(norm)[:, None] + divergence
    compared[NLL] = log_total - np.where(holds(truth), own[:, None], estimate)
    compared[GAP] = best - next_best
    with np.errstate(divide="ignore"):  # no cluster is left
        compared[TAIL] = np.log(unscored / (total + unscored))
    return compared.transpose(2, 0, 1), np.log(norm) - own


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


def choose_unverified(measured: PositionMeasures, goal: float, nbytes: StepBytes) -> int:
    """The fewest probes whose proposals agree with the dense head's best token at the ``goal``, a
    share of unseen positions; or the most that the bytes allow."""
    n_positions = measured.values.shape[2]
    # the goal, or the bound that so few positions can show if all of them agree
    possible = min(goal, lower_bound(1.0, n_positions) - 1e-9)
    chosen = measured.probe_counts[0]
    for n_probes, values in zip(measured.probe_counts, measured.values, strict=True):
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


def choose_verified(measured: PositionMeasures, nbytes: StepBytes) -> int:
    """The probes of the fewest expected bytes per token of verified decoding."""
    shares = measured.rejected_shares().mean(axis=0).tolist()
    shares_of = zip(measured.probe_counts, shares, strict=True)
    return min(shares_of, key=lambda probes_and_share: nbytes.verified(*probes_and_share))[0]


def verification_settings(measured: PositionMeasures, n_probes: int) -> dict:
    """The stored settings of verified decoding: shares of positions with another proposal
    ``by_probes``, and the ``risk`` of `head/steps.py` near ``n_probes``.

    Some have the ``risks`` of held-out positions in their order, for `lossless/policy.py`: each in
    1/10,000 and one more, negative where the greedy proposal differs.
    """
    probes = np.array(measured.probe_counts)
    near = measured.values[(probes >= n_probes / NEAR) & (probes <= n_probes * NEAR)]
    gaps, differs = near[:, GAP].ravel(), near[:, AGREEMENT].ravel() == 0
    left = np.isfinite(gaps)  # elsewhere all clusters are scored
    estimated = np.exp(near[:, TAIL], dtype=np.float64).sum()
    unscored = (1 - near[:, MASS].astype(np.float64)).sum()
    a, b = fit_greedy_risk(gaps[left], differs[left])
    scale = float(unscored / estimated) if estimated > 0 else 1.0
    greedy, sampled = measured.rejected_shares().clip(0.0).tolist()
    rows: list[dict[str, Any]] = [
        {"n_probes": n, "greedy_differs": g, "sampled_differs": s}
        for n, g, s in zip(measured.probe_counts, greedy, sampled, strict=True)
    ]
    for share in RECORDED_AT:
        nearest = int(np.abs(probes - share * n_probes).argmin())
        values = measured.values[nearest, :, :RECORDED_POSITIONS]
        risks = np.exp(np.minimum(a - b * values[GAP].astype(np.float64), 0))
        units = np.rint(RISK_UNITS * risks).astype(int) + 1
        rows[nearest]["risks"] = np.where(values[AGREEMENT] == 0, -units, units).tolist()
    return {"risk": {"greedy": [a, b], "sampled": scale}, "by_probes": rows}


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


def make_report(measured: PositionMeasures, n_probes: int, nbytes: StepBytes) -> dict:
    """The stored report, JSON-ready, of the head's own choices at ``n_probes``; None for
    infinity."""
    dense_perplexity = measured.dense_perplexity()
    by_probes = {
        means.n_probes: {
            "n_probes": means.n_probes,
            "agreement": means.agreement,
            "coverage": _finite(means.coverage),
            "kl": _finite(means.kl),
            "perplexity_ratio": _finite(means.perplexity / dense_perplexity),
            "bytes_per_token": round(nbytes.head(means.n_probes)),
            "bytes_share": nbytes.head(means.n_probes) / nbytes.dense,
        }
        for means in measured.means()
    }
    chosen = by_probes[n_probes]
    # those nearest to some multiples of the chosen number
    shown = (
        min(measured.probe_counts, key=lambda n: abs(n - wanted))
        for wanted in (n_probes * 2 ** (step / 2) for step in range(-4, 4))
    )
    return {
        "positions": measured.values.shape[-1],
        **{key: chosen[key] for key in ("agreement", "coverage", "kl", "perplexity_ratio")},
        "dense_perplexity": _finite(dense_perplexity),
        "dense_bytes": nbytes.dense,
        "by_probes": [by_probes[n] for n in sorted({*shown, n_probes})],
    }


def report_lines(config: FlashHeadConfig) -> list[str]:
    """The report as a table and the choice as a sentence; without a report, the choice alone."""
    scored = f"{config.n_probes:,} of {config.n_clusters:,} clusters per token"
    if not config.report:
        return [f"{scored}, not calibrated"]
    differing = {row["n_probes"]: row for row in config.verification["by_probes"]}
    lines = ["  probes   bytes  rejected: greedy  sampled      KL perplexity"]
    for row in config.report["by_probes"]:
        n_probes = row["n_probes"]
        differs = differing[n_probes]
        kl, ratio = (
            "–" if row[key] is None else f"{row[key]:.3f}" for key in ("kl", "perplexity_ratio")
        )
        lines.append(
            f"{'✓' * (n_probes == config.n_probes):2}{n_probes:>6,} "
            f"{percent(row['bytes_share'], 1):>7}  {percent(differs['greedy_differs']):>16} "
            f"{percent(differs['sampled_differs']):>8} {kl:>7} {ratio:>10}"
        )
    lines += [
        f"On {config.report['positions']:,} held-out positions: bytes and perplexity relative to",
        "the normal (dense) head; how often verification would reject the proposed token,",
        "greedily and sampled at temperature 1; KL of the estimates from it, in nats.",
        f"✓ {scored} are expected to be fastest.",
    ]
    if config.calibration.get("cut_short"):
        lines.append(
            f"The text was cut short by the time limit, after {config.calibration['positions']:,} "
            "positions: a build on a quiet machine, or with more `calibration_seconds`, is faster "
            "per token."
        )
    if "head_bits" not in config.report:
        return lines
    lines.append("    head      KL  same best token  perplexity     memory     dense  FlashHead")
    for row in config.report["head_bits"]["rows"]:
        lines.append(
            f"{row['bits']:>3} bits {row['kl']:>7.4f} {percent(row['agreement'], 1):>16} "
            f"{row['perplexity']:>11.2f} {megabytes(row['bytes']):>10} {row['dense_ms']:>6.2f} ms "
            f"{row['flash_head_ms']:>7.2f} ms"
        )
    return [
        *lines,
        f"On {config.report['head_bits']['positions']:,} of these positions, from the unquantized "
        "head; the time per token of the dense",
        "head as measured here, and with FlashHead as estimated from the bytes that are read.",
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
