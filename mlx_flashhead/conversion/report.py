"""The report of a conversion: figures that are stored with the index, and their tables."""

from typing import Any

import numpy as np

from ..common.tables import percent
from ..index.settings import FlashHeadConfig
from .measures import PositionMeasures
from .probes import StepBytes

SHOWN_MULTIPLES = tuple(2 ** (step / 2) for step in range(-4, 4))  # of the chosen probes


def make_report(measured: PositionMeasures, n_probes: int, nbytes: StepBytes) -> dict[str, Any]:
    """The stored report of the head's own choices.

    Args:
        measured: The measures, by number of probes.
        n_probes: The chosen number of probes.
        nbytes: What a step reads.

    Returns:
        The report, JSON-ready: None stands for infinity.
    """
    perplexity = measured.dense_perplexity()
    by_probes = {}
    for means in measured.means():
        n = means["n_probes"]
        by_probes[n] = {
            "n_probes": _finite(n),
            "agreement": _finite(means["agreement"]),
            "coverage": _finite(means["coverage"]),
            "kl": _finite(means["kl"]),
            "perplexity_ratio": _finite(means["perplexity"] / perplexity),
            "bytes_per_token": round(nbytes.head(n)),
            "bytes_share": nbytes.share(n),
        }
    # shown are those nearest to some multiples of the chosen number
    shown = {n_probes}
    measured_probes = np.array(measured.probe_counts)
    for multiple in SHOWN_MULTIPLES:
        nearest = int(np.abs(measured_probes - multiple * n_probes).argmin())
        shown.add(measured.probe_counts[nearest])
    chosen = by_probes[n_probes]
    return {
        "positions": measured.values.shape[-1],
        "agreement": chosen["agreement"],
        "coverage": chosen["coverage"],
        "kl": chosen["kl"],
        "perplexity_ratio": chosen["perplexity_ratio"],
        "dense_perplexity": _finite(perplexity),
        "dense_bytes": nbytes.dense,
        "by_probes": [by_probes[n] for n in sorted(shown)],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


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
    return lines


def _probes_table(config: FlashHeadConfig) -> list[str]:
    """A line for each number of probes, after the headings."""
    differing = {row["n_probes"]: row for row in config.verification["by_probes"]}
    lines = ["  probes   bytes  rejected: greedy  sampled      KL perplexity"]
    for row in config.report["by_probes"]:
        n_probes = row["n_probes"]
        mark = "✓" if n_probes == config.n_probes else ""
        share = percent(row["bytes_share"], 1)
        greedy = percent(differing[n_probes]["greedy_differs"])
        sampled = percent(differing[n_probes]["sampled_differs"])
        kl = _three_decimals(row["kl"])
        ratio = _three_decimals(row["perplexity_ratio"])
        lines.append(
            f"{mark:2}{n_probes:>6,} {share:>7}  {greedy:>16} {sampled:>8} {kl:>7} {ratio:>10}"
        )
    return lines


def _three_decimals(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3f}"
