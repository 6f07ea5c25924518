"""Measures an unverified FlashHead on a text, against the dense head of the same model: its output,
before a model scales or caps its logits."""

import argparse
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.table import Table

from ..common.tables import new_table, percent, show
from ..conversion import take_all
from ..conversion.calibration import read_text, text_states
from ..conversion.measures import measure_positions
from ..head.flash_head import FlashHead
from ..head.matrix import as_float32
from ..loading.load import load
from ..models.install import installed_head
from ..models.locate import find_head

LEGEND = """\
agreement   same best token as the dense head
coverage    the true next token is scored
KL          from the dense head's distribution, in nats
perplexity  relative to dense, with the estimates of the tail
bytes       read per token, relative to the dense head"""


def run(args: argparse.Namespace) -> dict:
    text = read_text(args.text)
    model, tokenizer = load(args.model, flash_head=args.flash_head, build=not args.no_build)
    figures = evaluate(model, tokenizer, text, probe_counts=args.probes, positions=args.positions)
    show(make_table(figures))
    if args.plot:
        draw(figures, args.plot)
    return figures


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    probe_counts: Sequence[int] | None = None,
    positions: int | None = None,
) -> dict[str, Any]:
    """Positions, the dense perplexity, the model's own probes and clusters, and for each number of
    probes (default: several, and its own) a row of `conversion.measures`' means with its share of
    bytes. ValueError if a number is not 1 … C."""
    head = installed_head(model)
    usual = (n for n in (48, 96, 128, 192, 256, 512) if n <= head.n_clusters)
    counts = sorted({*(probe_counts or [*usual, head.unverified_probes])})
    for n_probes in counts:
        if not 1 <= n_probes <= head.n_clusters:
            raise ValueError(f"{n_probes} probes are not possible: choose 1 to {head.n_clusters}.")
    read = text_states(model, tokenizer, find_head(model), text, positions=positions)
    states, next_ids = take_all(read)
    rows, centroids = head.clustered.token_rows(), head.clustered.centroids
    weight = as_float32(rows.dequantized())
    bias = 0.0 if rows.bias is None else as_float32(rows.bias)
    measure = measure_positions(
        states,
        lambda h: h @ weight.T + bias,
        np.array(head.clustered.token_ids),
        lambda h: np.array(head.steps.route(mx.array(h))),
        np.array(centroids.tail_offset),
        counts,
        next_ids,
    )
    measured = take_all(measure)
    table = measured.means()
    for row in table:
        row["bytes_share"] = bytes_share(head, row["n_probes"])
    return {
        "positions": len(states),
        "dense_perplexity": measured.dense_perplexity(),
        "n_probes": head.unverified_probes,
        "n_clusters": head.n_clusters,
        "rows": table,
    }


def bytes_share(head: FlashHead, n_probes: int) -> float:
    """Bytes of weights read per token, centroids and p clusters, relative to the dense head."""
    rows = head.clustered.rows
    bytes_per_row = rows.nbytes / (head.n_clusters * head.cluster_size)
    read = head.clustered.centroids.routing_bytes + n_probes * head.cluster_size * bytes_per_row
    return read / (bytes_per_row * head.vocab_size)


def make_table(figures: dict) -> Table:
    """A line for each number of probes, the model's own in bold."""
    about = "{positions} positions, {n_clusters} clusters, dense perplexity {dense_perplexity:.2f}"
    headings = ("probes", "agreement", "coverage", "KL", "perplexity", "bytes")
    table = new_table(about.format(**figures), headings, LEGEND, left=0)
    for row in figures["rows"]:
        table.add_row(
            f"{row['n_probes']}",
            percent(row["agreement"]),
            percent(row["coverage"]),
            f"{row['kl']:.3f}",
            f"{row['perplexity'] / figures['dense_perplexity']:.3f}",
            percent(row["bytes_share"], 1),
            style="bold" if row["n_probes"] == figures["n_probes"] else None,
        )
    return table


def draw(figures: dict, path: str) -> None:
    """Draws agreement and coverage against the number of probes into a picture."""
    from matplotlib.figure import Figure  # which may be absent

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis, rows = figure.subplots(), figures["rows"]
    for name in ("agreement", "coverage"):
        shares = [100 * row[name] for row in rows]
        axis.plot([row["n_probes"] for row in rows], shares, marker="o", label=name)
    axis.axvline(figures["n_probes"], color="tab:gray", linestyle=":", label="as converted")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=f"clusters scored of {figures['n_clusters']:,}", ylabel="% of positions")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
