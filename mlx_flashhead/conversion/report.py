"""A conversion's report on held-out positions: as stored, and as text."""

from collections.abc import Sequence

import numpy as np

from ..common.quantities import percent
from .measures import Measures, PositionMeasures
from .positions import Positions
from .probes import Choice, Goals


def make_report(
    found: PositionMeasures,
    held_out: Positions,
    n_probes: int,
    *,
    stage_bytes: int,
    probe_bytes: float,
    dense_bytes: int,
    body_bytes: int | None,
) -> dict:
    """The stored report, JSON-ready. A perplexity too large for a float is None.

    The head's share of a token's time is estimated by the bytes of weights that a decode step
    reads, which bound it where memory does: (centroids + probes) / (body + centroids + probes).

    Args:
        found: Measures of one routing, at several numbers of probes, ``n_probes`` among them.
        held_out: The measured positions.
        n_probes: The chosen number.
        stage_bytes: Bytes of the centroids.
        probe_bytes: Bytes of a probe.
        dense_bytes: Bytes of the dense head.
        body_bytes: Bytes of all other layers, or None.
    """
    dense_perplexity = found.dense_perplexity()

    def row(measured: Measures, dense_perplexity: float) -> dict:
        return {
            "agreement": measured.agreement,
            "coverage": measured.coverage,
            "kl": _finite(measured.kl),
            "perplexity_ratio": _finite(measured.perplexity / dense_perplexity),
        }

    by_probes = []
    shown = _shown(found.probe_counts, n_probes)
    for measured in found.means():
        if measured.n_probes not in shown:
            continue
        n_bytes = stage_bytes + probe_bytes * measured.n_probes
        by_probes.append(
            {"n_probes": measured.n_probes}
            | row(measured, dense_perplexity)
            | {"bytes_per_token": round(n_bytes), "bytes_share": n_bytes / dense_bytes}
            | ({} if body_bytes is None else {"token_share": n_bytes / (body_bytes + n_bytes)})
        )
    (chosen_row,) = (row for row in by_probes if row["n_probes"] == n_probes)
    place = found.probe_counts.index(n_probes)
    by_kind = []
    for kind, name in enumerate(held_out.names):
        chosen = held_out.kinds == kind
        if chosen.any():
            measured = found.means(chosen)[place]
            by_kind.append(
                {"kind": name, "positions": int(chosen.sum())}
                | row(measured, found.dense_perplexity(chosen))
            )
    return {
        "positions": len(held_out),
        **{key: chosen_row[key] for key in ("agreement", "coverage", "kl", "perplexity_ratio")},
        "dense_perplexity": _finite(dense_perplexity),
        "dense_bytes": dense_bytes,
        "by_probes": by_probes,
        "by_kind": by_kind,
    }


def report_lines(report: dict, n_probes: int) -> list[str]:
    """The report as two tables of plain text, with a mark at the row of ``n_probes``."""
    figures = f"{'agreement':>9} {'KL':>6} {'perplexity':>10}"
    lines = [f"{'probes':>8} {figures} {'bytes':>7} {'token':>7}"]
    for row in report["by_probes"]:
        mark = "→" if row["n_probes"] == n_probes else ""
        share = row.get("token_share")
        lines.append(
            f"{mark:1} {row['n_probes']:>6,} {_figures(row)} {percent(row['bytes_share'], 1):>7} "
            + f"{'–' if share is None else percent(share, 1):>7}"
        )
    lines += ["", f"{'at ' + format(n_probes, ',') + ' probes':18} {'positions':>9} {figures}"]
    for row in report["by_kind"]:
        lines.append(f"{row['kind']:18} {row['positions']:>9,} {_figures(row)}")
    lines += [
        "",
        "Measured on held-out positions. KL from the dense head's distribution, in nats;",
        "perplexity and bytes relative to the dense head; token: the head's estimated share of a",
        "token's time, by the bytes of weights that are read: head / (body + head).",
    ]
    return lines


def choice_text(choice: Choice, n_clusters: int, goals: Goals) -> str:
    """The chosen number of probes, and the goals that it reaches or misses, in short sentences."""
    scored = f"{choice.n_probes:,} of {n_clusters:,} clusters per token"
    if not choice.missed:
        return f"{scored} are the fewest that reach {_joined(goals.in_words())}."
    return (
        f"{scored} miss {_joined(choice.missed)}. More would read over "
        f"{100 * goals.bytes_share:g} % of the dense head's bytes: ask for them with --n-probes."
    )


def _joined(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _shown(probe_counts: Sequence[int], n_probes: int) -> set[int]:
    """The numbers of probes nearest to some multiples of the chosen number."""
    wanted = [n_probes * 2 ** (step / 2) for step in range(-4, 4)]
    return {min(probe_counts, key=lambda n: abs(n - one)) for one in wanted}


def _figures(row: dict) -> str:
    ratio, kl = row["perplexity_ratio"], row["kl"]
    return (
        f"{percent(row['agreement']):>9} {'–' if kl is None else format(kl, '.3f'):>6} "
        f"{'–' if ratio is None else format(ratio, '.3f'):>10}"
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
