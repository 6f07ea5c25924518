"""How close retrieval comes to the dense head on held-out states, the numbers of probes that
follow, and the report.

- agreement: share of positions whose proposed token is the dense head's best.
- coverage: share of positions whose true next token is among the candidates.
- mass: probability, under the dense head, of the candidates.
- KL: mean divergence of the distribution with the tail from the dense one, in nats.
- perplexity: of the true next tokens, under the distribution with the tail.
- gap, tail: the best candidate's logit less the best score of an unscored cluster, and the log of
  the estimated share of the unscored tokens.

docs/how-it-works.md has the reasons for the numbers of probes.
"""

import math
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..common.tables import megabytes, percent
from ..head.matrix import AFFINE, Matrix, affine_group
from ..head.steps import MARGIN_SHARE
from ..index.settings import FlashHeadConfig
from . import Step, Steps

CHUNK_STATES, CHUNK_LOGITS = 32, 1 << 22  # at once, which bounds memory and the time of a step
LEAST_LOGIT = np.float32(-1e30)
GREATEST_TAIL = 100.0  # of an estimate over the best logit: forced clusters have a huge score
# Places of a position's measures.
AGREEMENT, COVERAGE, MASS, KL, NLL, GAP, TAIL = range(7)
NAMES = ("n_probes", "agreement", "coverage", "mass", "kl", "perplexity")  # of their means

CONFIDENCE_Z = 1.645  # standard errors of a one-sided confidence of 95 %
PROBES_MULTIPLE = 8  # numbers of probes are multiples of it
GRID_STEP = 1.15  # greatest ratio of two neighbouring numbers of probes
MAX_BYTES = 0.25  # read per token without verification, relative to the dense head
MAX_PENDING = 32  # positions of one verification

NEAR = 1.4  # greatest ratio of the chosen number of probes to one that the risks are fitted on
SLOPES = np.geomspace(0.25, 4.0, 33)
SLOPE_SPREAD = 0.3  # standard deviation of the log of the slope before anything is seen
UNSEEN_DIFFERENCE = 0.5  # positions: where none differs, one in twice as many may still
RECORDED_AT, RECORDED_POSITIONS = (0.5, 1.0, 2.0), 512  # risks for the tuning, at these shares
RISK_UNITS = 10_000  # in a risk of 1, as they are recorded

COMPARED_BITS = 4  # what other conversions give the head
COMPARED_POSITIONS, COMPARED_AT_ONCE = 512, 32

Products = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PositionMeasures:
    """Measures at each of N positions, for each of P numbers of probes."""

    probe_counts: Sequence[int]
    values: np.ndarray  # (P, 7, N) float32, by the places above
    dense_nll: np.ndarray  # (N,) float64, of the true next tokens under the dense head

    def means(self) -> list[dict[str, Any]]:
        """The measures over all positions by their `NAMES`, for each number of probes."""
        means = self.values[:, :GAP].mean(axis=2, dtype=np.float64).tolist()
        return [
            dict(zip(NAMES, [n_probes, *shares, float(np.exp(nll))], strict=True))
            for n_probes, (*shares, nll) in zip(self.probe_counts, means, strict=True)
        ]

    def rejected_shares(self) -> np.ndarray:
        """Shares (2, P) of positions with another proposal: greedy, and at temperature 1."""
        return 1 - self.values[:, [AGREEMENT, MASS]].mean(axis=2, dtype=np.float64).T

    def dense_perplexity(self) -> float:
        return float(np.exp(self.dense_nll.mean()))


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
    n_clusters, cluster_size = token_ids.shape
    size = max(1, min(CHUNK_STATES, CHUNK_LOGITS // token_ids.size))
    probes = np.array(probe_counts)
    listed = min(int(probes.max()) + 1, n_clusters)  # one more, the best that is not scored
    values = np.empty((len(probes), 7, len(states)), np.float32)
    dense_nll = np.empty(len(states))
    flat = token_ids.ravel().astype(np.int64)
    cluster_of = np.argsort(flat, kind="stable") // cluster_size  # padded slots come last
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        logits, scores, truth = logits_of(states[part]), scores_of(states[part]), next_ids[part]
        rows, sizes = np.arange(len(logits)), (token_ids < logits.shape[1]).sum(1)
        # a padded slot reads a column of -inf and adds nothing to a sum
        padded = np.pad(logits, ((0, 0), (0, 1)), constant_values=-np.inf)
        blocks = padded[:, flat].reshape(-1, n_clusters, cluster_size)
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
        tail = np.minimum((scores + tail_offset).astype(np.float64) - top[:, None], GREATEST_TAIL)
        weight = sizes * np.exp(tail)
        moved = mean_logit - mass * tail

        order = np.argpartition(-scores, listed - 1, axis=1)[:, :listed]
        ranks = np.argsort(-np.take_along_axis(scores, order, 1), axis=1, kind="stable")
        order = np.take_along_axis(order, ranks, 1)
        # over the scored clusters, (n, P)
        sums = np.take_along_axis(np.stack([cluster_sum, weight, moved, mass]), order[None], 2)
        total, estimated, divergence, scored = sums.cumsum(2)[:, :, probes - 1]
        best = np.maximum.accumulate(np.take_along_axis(best_of, order, 1), 1)[:, probes - 1]
        best = best.astype(np.float64)
        # over the others: the best score, none where all are scored; the estimates
        ranked = np.take_along_axis(scores, order, 1).astype(np.float64)
        next_best = np.pad(ranked, ((0, 0), (0, 1)), constant_values=-np.inf)[:, probes]
        unscored = np.maximum(weight.sum(1)[:, None] - estimated, 0.0)
        log_total = np.log(total + unscored)
        divergence = moved.sum(1)[:, None] - divergence
        cap = best - np.maximum(1.0, np.abs(best) * MARGIN_SHARE)  # of an estimate, as in the head
        for i, j in np.argwhere(next_best + tail_offset.max() > cap):
            left = np.ones(n_clusters, bool)
            left[order[i, : probes[j]]] = False
            capped = np.minimum(tail[i, left], cap[i, j] - top[i])
            log_total[i, j] = np.log(total[i, j] + sizes[left] @ np.exp(capped))
            divergence[i, j] = (mean_logit[i, left] - mass[i, left] * capped).sum()

        # whether the dense head's best token, and the true one, are in a scored cluster
        held = []
        for tokens in (logits.argmax(1), truth):
            score = scores[rows, cluster_of[tokens]][:, None]
            held.append((scores > score).sum(1)[:, None] < probes)
        own = logits[rows, truth].astype(np.float64) - top
        estimate = np.minimum(tail[rows, cluster_of[truth]][:, None], cap - top[:, None])
        dense_nll[part] = np.log(norm) - own
        with np.errstate(divide="ignore"):  # no cluster is left
            log_tail = np.log(unscored / (total + unscored))
        # KL: sum over v of P_v (log P_v - log Q_v); probed tokens share the dense head's logit
        compared = (
            *held,
            np.minimum(scored, 1.0),
            log_total - np.log(norm)[:, None] + divergence,
            log_total - np.where(held[1], own[:, None], estimate),
            best - next_best,
            log_tail,
        )
        values[:, :, part] = np.stack(compared).transpose(2, 0, 1)
        yield Step("Measuring", start + len(logits), len(states), "position")
    return PositionMeasures(probe_counts, values, dense_nll)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of weights that a decoding step reads."""

    centroids: int
    probe: float  # the rows of one cluster
    dense: float  # all rows
    body: int = 0  # all other layers

    def head(self, n_probes: int) -> float:
        return self.centroids + n_probes * self.probe

    def share(self, n_probes: int) -> float:
        """The bytes of `head`, relative to those of the dense head."""
        return self.head(n_probes) / self.dense

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
    means = measured.means()
    most = MAX_BYTES * nbytes.dense
    allowed = [each for each in means if nbytes.head(each["n_probes"]) <= most] or means[:1]
    agreeing = (m for m in allowed if lower_bound(m["agreement"], n_positions) >= possible)
    return next(agreeing, allowed[-1])["n_probes"]


def lower_bound(share: float, n: int) -> float:
    """The lower end of Wilson's interval around a share of n positions.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927), one-sided.
    """
    square = CONFIDENCE_Z**2 / n
    error = np.sqrt(square * share * max(1 - share, 0) + square**2 / 4)
    return float((share + square / 2 - error) / (1 + square))


def expected_bytes(measured: PositionMeasures, n_probes: int, nbytes: StepBytes) -> float:
    """Bytes per token of verified decoding, if proposals are rejected as often as measured."""
    rejected = measured.rejected_shares().mean(axis=0)
    return nbytes.verified(n_probes, float(rejected[list(measured.probe_counts).index(n_probes)]))


def choose_verified(measured: PositionMeasures, nbytes: StepBytes) -> int:
    """The probes of the fewest expected bytes."""
    return min(measured.probe_counts, key=lambda n: expected_bytes(measured, n, nbytes))


def verification_settings(measured: PositionMeasures, n_probes: int) -> dict[str, Any]:
    """The stored settings of verified decoding: shares of positions with another proposal
    ``by_probes``, and the ``risk`` of `head/steps.py` near ``n_probes``.

    Some have the ``risks`` of held-out positions in their order, for `decoding/tuning.py`: each in
    1/10,000 and one more, negative where the greedy proposal differs.
    """
    probes = np.array(measured.probe_counts)
    near = measured.values[(probes >= n_probes / NEAR) & (probes <= n_probes * NEAR)]
    gaps, differs = near[:, GAP].ravel(), near[:, AGREEMENT].ravel() == 0
    left = np.isfinite(gaps)  # elsewhere all clusters are scored
    a, b = fit_greedy_risk(gaps[left], differs[left])
    estimated = np.exp(near[:, TAIL], dtype=np.float64).sum()
    unscored = (1 - near[:, MASS].astype(np.float64)).sum()
    scale = float(unscored / estimated) if estimated > 0 else 1.0
    shares = measured.rejected_shares().clip(0.0).T.tolist()
    rows: list[dict[str, Any]] = [
        {"n_probes": n, "greedy_differs": greedy, "sampled_differs": sampled}
        for n, (greedy, sampled) in zip(measured.probe_counts, shares, strict=True)
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
    falling = -SLOPES[:, None] * gaps.astype(np.float64)
    low, high = -falling.max(axis=1) - 50.0, -falling.min(axis=1) + 1.0
    for _ in range(60):
        offset = (low + high) / 2
        risk = np.exp(np.minimum(offset[:, None] + falling, 0))
        above = risk.sum(axis=1) > wanted
        low, high = np.where(above, low, offset), np.where(above, offset, high)
    risk = np.clip(risk, 1e-12, 1 - 1e-6)  # for the logarithms
    likelihood = np.log(np.where(differs, risk, 1 - risk)).sum(axis=1)
    best = (likelihood - (np.log(SLOPES) / SLOPE_SPREAD) ** 2 / 2).argmax()
    return float(offset[best]), float(SLOPES[best])


def make_report(measured: PositionMeasures, n_probes: int, nbytes: StepBytes) -> dict[str, Any]:
    """The stored report of the head's own choices at ``n_probes``, for JSON; None for infinity."""

    def finite(value: float) -> float | None:
        return value if np.isfinite(value) else None

    perplexity = measured.dense_perplexity()
    by_probes = {
        means["n_probes"]: {
            **{key: finite(means[key]) for key in ("n_probes", "agreement", "coverage", "kl")},
            "perplexity_ratio": finite(means["perplexity"] / perplexity),
            "bytes_per_token": round(nbytes.head(means["n_probes"])),
            "bytes_share": nbytes.share(means["n_probes"]),
        }
        for means in measured.means()
    }
    # shown are those nearest to some multiples of the chosen number
    multiples = (n_probes * 2 ** (step / 2) for step in range(-4, 4))
    shown = {min(by_probes, key=lambda n: abs(n - wanted)) for wanted in multiples}
    chosen = by_probes[n_probes]
    return {
        "positions": measured.values.shape[-1],
        **{key: chosen[key] for key in ("agreement", "coverage", "kl", "perplexity_ratio")},
        "dense_perplexity": finite(perplexity),
        "dense_bytes": nbytes.dense,
        "by_probes": [by_probes[n] for n in sorted(shown | {n_probes})],
    }


def compare_bits(
    measured: PositionMeasures,
    n_probes: int,
    nbytes: StepBytes,
    original: Matrix,
    rows: Matrix,
    states: np.ndarray,
    next_ids: np.ndarray,
) -> Steps[dict[str, Any]]:
    """Compares a head at 4 bits and its ``rows`` with the ``original``, unquantized one, on some of
    the held-out ``states`` (N, D) float32 and the tokens (N,) after them; JSON-ready."""
    group = rows.group_size if rows.mode == AFFINE else affine_group(original.hidden_size)
    heads = {rows.bits: rows, 8 * original.weight.dtype.size: original}
    if COMPARED_BITS not in heads and group:
        heads[COMPARED_BITS] = original.quantize(bits=COMPARED_BITS, group_size=group)
    chosen = np.linspace(0, len(states) - 1, min(len(states), COMPARED_POSITIONS)).astype(int)
    totals = dict.fromkeys(heads, np.zeros(3))
    for start in range(0, len(chosen), COMPARED_AT_ONCE):
        part = chosen[start : start + COMPARED_AT_ONCE]
        hidden, truth = mx.array(states[part]), mx.array(next_ids[part])[:, None]
        expected = nn.log_softmax(original.matmul(hidden).astype(mx.float32))
        for bits, head in heads.items():
            actual = nn.log_softmax(head.matmul(hidden).astype(mx.float32))
            kl = (mx.exp(expected) * (expected - actual)).sum()
            same = (actual.argmax(axis=-1) == expected.argmax(axis=-1)).sum()
            loss = -mx.take_along_axis(actual, truth, axis=-1).sum()
            totals[bits] = totals[bits] + np.array([kl.item(), same.item(), loss.item()])
        yield Step("Comparing bits", start + len(part), len(chosen), "position")
    hidden, table = mx.array(states[:1]).astype(original.weight.dtype), []
    for bits, head in sorted(heads.items()):
        kl, same, loss = (totals[bits] / len(chosen)).tolist()
        product = partial(lambda head: mx.eval(head.matmul(hidden)), head)
        milliseconds = 1000 * min(timeit.repeat(product, number=1, repeat=5))
        probe = nbytes.probe * head.nbytes / nbytes.dense
        read = expected_bytes(measured, n_probes, replace(nbytes, probe=probe, dense=head.nbytes))
        row = {"bits": bits, "kl": max(kl, 0.0), "agreement": same}
        row |= {"perplexity": float(np.exp(loss)), "bytes": head.nbytes, "dense_ms": milliseconds}
        row["flash_head_ms"] = milliseconds * (read - nbytes.body) / head.nbytes
        table.append(row)
    return {"positions": len(chosen), "rows": table}


def report_lines(config: FlashHeadConfig) -> list[str]:
    """The report as a table and the choice as a sentence; without a report, the choice alone."""
    scored = f"{config.n_probes:,} of {config.n_clusters:,} clusters per token"
    report = config.report
    if not report:
        return [f"{scored}, not calibrated"]
    differing = {row["n_probes"]: row for row in config.verification["by_probes"]}
    lines = ["  probes   bytes  rejected: greedy  sampled      KL perplexity"]
    for row in report["by_probes"]:
        n_probes, figures = row["n_probes"], (row["kl"], row["perplexity_ratio"])
        kl, ratio = ("–" if figure is None else f"{figure:.3f}" for figure in figures)
        greedy, sampled = (differing[n_probes][f"{way}_differs"] for way in ("greedy", "sampled"))
        lines.append(
            f"{'✓' * (n_probes == config.n_probes):2}{n_probes:>6,} "
            f"{percent(row['bytes_share'], 1):>7}  {percent(greedy):>16} {percent(sampled):>8} "
            f"{kl:>7} {ratio:>10}"
        )
    lines += [
        f"On {report['positions']:,} held-out positions: bytes and perplexity relative to",
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
    if "head_bits" in report:
        compared = report["head_bits"]
        lines += [
            "    head      KL  same best token  perplexity     memory     dense  FlashHead",
            *(
                f"{row['bits']:>3} bits {row['kl']:>7.4f} {percent(row['agreement'], 1):>16} "
                f"{row['perplexity']:>11.2f} {megabytes(row['bytes']):>10} "
                f"{row['dense_ms']:>6.2f} ms {row['flash_head_ms']:>7.2f} ms"
                for row in compared["rows"]
            ),
            f"On {compared['positions']:,} of these positions, from the unquantized head; the time "
            "per token of the dense",
            "head as measured here, and with FlashHead as estimated from the bytes that are read.",
        ]
    return lines
