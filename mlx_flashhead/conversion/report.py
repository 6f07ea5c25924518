"""A conversion's report on held-out positions: as stored, and as text."""

import numpy as np

from ..common.tables import percent
from ..index.settings import FlashHeadConfig
from .measures import PositionMeasures
from .probes import StepBytes


def make_report(found: PositionMeasures, n_probes: int, nbytes: StepBytes) -> dict:
    """The stored report, JSON-ready, of the head's own choices at ``n_probes``; None for
    infinity."""
    dense_perplexity = found.dense_perplexity()
    by_probes = {
        measured.n_probes: {
            "n_probes": measured.n_probes,
            "agreement": measured.agreement,
            "coverage": _finite(measured.coverage),
            "kl": _finite(measured.kl),
            "perplexity_ratio": _finite(measured.perplexity / dense_perplexity),
            "bytes_per_token": round(nbytes.head(measured.n_probes)),
            "bytes_share": nbytes.head(measured.n_probes) / nbytes.dense,
        }
        for measured in found.means()
    }
    chosen = by_probes[n_probes]
    # those nearest to some multiples of the chosen number
    shown = (
        min(found.probe_counts, key=lambda n: abs(n - wanted))
        for wanted in (n_probes * 2 ** (step / 2) for step in range(-4, 4))
    )
    return {
        "positions": found.values.shape[-1],
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
            "positions: a build on a quiet machine, or with more calibration_seconds, is faster "
            "per token."
        )
    return lines


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
