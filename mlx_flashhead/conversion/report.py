"""The report of a conversion: figures that are stored with the index, and their tables."""

import timeit
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..common.tables import megabytes, percent
from ..head.matrix import AFFINE, Matrix, affine_group
from ..index.flash_head_config import FlashHeadConfig
from . import Progress, Task
from .measures import PositionMeasures
from .probes import BytesRead, expected_bytes

# The report shows these multiples of the chosen number of probes.
SHOWN_MULTIPLES = tuple(2 ** (exponent / 2) for exponent in range(-4, 4))
# Other conversions give the head so many bits.
COMPARED_BITS = 4
COMPARED_POSITIONS = 512
COMPARED_AT_ONCE = 32


def make_report(measured: PositionMeasures, n_probes: int, nbytes: BytesRead) -> dict[str, Any]:
    """The stored report of the head's own choices.

    Args:
        measured: The measures, by number of probes.
        n_probes: The chosen number of probes.
        nbytes: What a step reads.

    Returns:
        The report, JSON-ready: None stands for infinity.
    """
    perplexity = measured.dense_perplexity
    counts = np.array(measured.probe_counts)
    # The report shows those nearest to some multiples of the chosen number.
    nearest = [int(np.abs(counts - multiple * n_probes).argmin()) for multiple in SHOWN_MULTIPLES]
    shown = {n_probes, *counts[nearest].tolist()}
    by_probes = {}
    for means in measured.means():
        n = means["n_probes"]
        if n not in shown:
            continue
        by_probes[n] = {
            "n_probes": n,
            "agreement": _finite(means["agreement"]),
            "coverage": _finite(means["coverage"]),
            "kl": _finite(means["kl"]),
            "perplexity_ratio": _finite(means["perplexity"] / perplexity),
            "bytes_per_token": round(nbytes.head(n)),
            "bytes_share": nbytes.share(n),
        }
    chosen = by_probes[n_probes]
    return {
        "positions": measured.values.shape[-1],
        "agreement": chosen["agreement"],
        "coverage": chosen["coverage"],
        "kl": chosen["kl"],
        "perplexity_ratio": chosen["perplexity_ratio"],
        "dense_perplexity": _finite(perplexity),
        "dense_bytes": nbytes.dense,
        "by_probes": list(by_probes.values()),
    }


def _finite(value: float) -> float | None:
    if np.isfinite(value):
        return value
    return None


def compare_bits(
    measured: PositionMeasures,
    n_probes: int,
    nbytes: BytesRead,
    original: Matrix,
    rows: Matrix,
    states: np.ndarray,
    next_ids: np.ndarray,
) -> Task[dict[str, Any]]:
    """Compares a head at 4 bits and as it is converted with the original one.

    Args:
        measured: The measures, by number of probes.
        n_probes: The chosen number of probes.
        nbytes: What a step reads with ``rows``.
        original: The unquantized rows (V, D).
        rows: The converted rows (V, D).
        states: The held-out states (N, D) float32, some of which are compared.
        next_ids: The tokens after them (N,).

    Returns:
        The figures, JSON-ready: a row for each number of bits.
    """
    group_size = affine_group(original.hidden_size)
    if rows.mode == AFFINE:
        group_size = rows.group_size
    heads = {rows.bits: rows, 8 * original.weight.dtype.size: original}
    if COMPARED_BITS not in heads and group_size:
        heads[COMPARED_BITS] = original.quantize(bits=COMPARED_BITS, group_size=group_size)
    n_compared = min(len(states), COMPARED_POSITIONS)
    chosen = np.linspace(0, len(states) - 1, n_compared).astype(int)
    totals = {bits: np.zeros(3) for bits in heads}
    for start in range(0, len(chosen), COMPARED_AT_ONCE):
        part = chosen[start : start + COMPARED_AT_ONCE]
        hidden = mx.array(states[part])
        truth = mx.array(next_ids[part])[:, None]
        expected = nn.log_softmax(original.matmul(hidden).astype(mx.float32))
        for bits, head in heads.items():
            actual = nn.log_softmax(head.matmul(hidden).astype(mx.float32))
            kl = (mx.exp(expected) * (expected - actual)).sum()
            same = (actual.argmax(axis=-1) == expected.argmax(axis=-1)).sum()
            loss = -mx.take_along_axis(actual, truth, axis=-1).sum()
            totals[bits] += [kl.item(), same.item(), loss.item()]
        yield Progress("Comparing bits", len(part), len(chosen))
    hidden = mx.array(states[:1]).astype(original.weight.dtype)
    table = []
    for bits, head in sorted(heads.items()):
        kl, same, loss = (totals[bits] / len(chosen)).tolist()
        milliseconds = _product_milliseconds(head, hidden)
        probe = nbytes.probe * head.nbytes / nbytes.dense
        read_bytes = replace(nbytes, probe=probe, dense=head.nbytes)
        read = expected_bytes(measured, n_probes, read_bytes)
        table.append(
            {
                "bits": bits,
                "kl": max(kl, 0.0),
                "agreement": same,
                "perplexity": float(np.exp(loss)),
                "bytes": head.nbytes,
                "dense_ms": milliseconds,
                "flash_head_ms": milliseconds * (read - nbytes.body) / head.nbytes,
            }
        )
    return {"positions": len(chosen), "rows": table}


def _product_milliseconds(head: Matrix, hidden: mx.array) -> float:
    """How long a product of the head's rows with a state (1, D) takes: the shortest of a few."""
    seconds = timeit.repeat(lambda: mx.eval(head.matmul(hidden)), number=1, repeat=5)
    return 1000 * min(seconds)


def report_lines(config: FlashHeadConfig) -> list[str]:
    """The report as a table and the choice as a sentence; without a report, the choice alone.

    Args:
        config: The settings that hold the report.
    """
    scored = f"{config.n_probes:,} of {config.n_clusters:,} clusters per token"
    report = config.report
    if not report:
        return [f"{scored}, not calibrated"]
    lines = _probes_table(config)
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
        lines.append(
            "    head      KL  same best token  perplexity     memory     dense  FlashHead"
        )
        for row in compared["rows"]:
            lines.append(
                f"{row['bits']:>3} bits {row['kl']:>7.4f} {percent(row['agreement'], 1):>16} "
                f"{row['perplexity']:>11.2f} {megabytes(row['bytes']):>10} "
                f"{row['dense_ms']:>6.2f} ms {row['flash_head_ms']:>7.2f} ms"
            )
        lines += [
            f"On {compared['positions']:,} of these positions, from the unquantized head; the time "
            "per token of the dense",
            "head as measured here, and with FlashHead as estimated from the bytes that are read.",
        ]
    return lines


def _probes_table(config: FlashHeadConfig) -> list[str]:
    """A line for each number of probes, after the headings."""
    differing = {row["n_probes"]: row for row in config.verification["by_probes"]}
    lines = ["  probes   bytes  rejected: greedy  sampled      KL perplexity"]
    for row in config.report["by_probes"]:
        n_probes = row["n_probes"]
        mark = ""
        if n_probes == config.n_probes:
            mark = "✓"
        differs = differing[n_probes]
        lines.append(
            f"{mark:2}{n_probes:>6,} {percent(row['bytes_share'], 1):>7}  "
            f"{percent(differs['greedy_differs']):>16} {percent(differs['sampled_differs']):>8} "
            f"{_three_decimals(row['kl']):>7} {_three_decimals(row['perplexity_ratio']):>10}"
        )
    return lines


def _three_decimals(figure: float | None) -> str:
    if figure is None:
        return "–"
    return f"{figure:.3f}"
