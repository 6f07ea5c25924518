"""Measures an unverified FlashHead on a text, against the dense head of the same model.

Both are compared at their output, before a model scales or caps its logits.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.table import Table

from ..common.tables import new_table, percent, show
from ..conversion import run_task
from ..conversion.calibration import read_text, text_states
from ..conversion.measures import measure_positions
from ..conversion.probes import BytesRead
from ..head.flash_head import FlashHead
from ..head.matrix import as_float32
from ..loading.load import load
from ..models.install import installed_head
from ..models.locate import find_head

USUAL_PROBES = (48, 96, 128, 192, 256, 512)
LEGEND = """\
agreement   same best token as the dense head
coverage    the true next token is scored
KL          from the dense head's distribution, in nats
perplexity  relative to dense, with the estimates of the tail
bytes       read per token, relative to the dense head"""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures as the flags say, prints a table and draws the curves.

    Args:
        args: The flags of ``mlx_flashhead.evaluate text``.

    Returns:
        The figures of `measure_agreement`.
    """
    text = read_text(args.text)
    model, tokenizer = load(args.model, flash_head=args.flash_head, build=not args.no_build)
    figures = measure_agreement(
        model, tokenizer, text, probe_counts=args.probes, positions=args.positions
    )
    show(make_table(figures))
    if args.plot:
        plot_agreement(figures, args.plot)
    return figures


def measure_agreement(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    probe_counts: Sequence[int] | None = None,
    positions: int | None = None,
) -> dict[str, Any]:
    """Compares a model's FlashHead with its dense head on a text.

    Args:
        model: A model with a FlashHead.
        tokenizer: The model's tokenizer, of mlx-lm.
        text: The text to measure on.
        probe_counts: Numbers of probes to measure (default: several, and the head's own).
        positions: The most positions to measure (default: all).

    Returns:
        The figures, JSON-ready: ``positions``, ``dense_perplexity``, the head's ``n_probes`` and
        ``n_clusters``, and ``rows``: for each number of probes the means of
        `conversion.measures` and the ``bytes_share``.

    Raises:
        ValueError: If a number of probes is not 1 … C.
    """
    head = installed_head(model)
    counts = set(probe_counts or ())
    if not counts:
        counts.update(n for n in USUAL_PROBES if n <= head.n_clusters)
        counts.add(head.unverified_probes)
    for n_probes in sorted(counts):
        if not 1 <= n_probes <= head.n_clusters:
            raise ValueError(f"{n_probes} probes are not possible: choose 1 to {head.n_clusters}.")
    reading = text_states(model, tokenizer, find_head(model), text, positions=positions)
    states, next_ids = run_task(reading)
    rows = head.clustered.token_rows()
    weight = as_float32(rows.dequantized())
    bias = rows.bias

    def dense_logits(hidden: np.ndarray) -> np.ndarray:
        logits: np.ndarray = hidden @ weight.T
        if bias is not None:
            logits += as_float32(bias)
        return logits

    def cluster_scores(hidden: np.ndarray) -> np.ndarray:
        return np.array(head.operations.route(mx.array(hidden)))

    measuring = measure_positions(
        states,
        dense_logits,
        np.array(head.clustered.token_ids),
        cluster_scores,
        np.array(head.clustered.centroids.tail_offset),
        sorted(counts),
        next_ids,
    )
    measured = run_task(measuring)
    nbytes = bytes_read(head)
    table = measured.means()
    for row in table:
        row["bytes_share"] = nbytes.share(row["n_probes"])
    return {
        "positions": len(states),
        "dense_perplexity": measured.dense_perplexity,
        "n_probes": head.unverified_probes,
        "n_clusters": head.n_clusters,
        "rows": table,
    }


def bytes_read(head: FlashHead) -> BytesRead:
    """The bytes of weights that a FlashHead, and the dense head, read for a token."""
    rows = head.clustered.rows
    row_bytes = rows.nbytes / (head.n_clusters * head.cluster_size)
    return BytesRead(
        centroids=head.clustered.centroids.routing_bytes,
        probe=head.cluster_size * row_bytes,
        dense=row_bytes * head.vocab_size,
    )


def make_table(figures: dict[str, Any]) -> Table:
    """A table with a line for each number of probes, the model's own in bold.

    Args:
        figures: What `measure_agreement` returns.
    """
    title = "{positions} positions, {n_clusters} clusters, dense perplexity {dense_perplexity:.2f}"
    headings = ("probes", "agreement", "coverage", "KL", "perplexity", "bytes")
    table = new_table(title.format(**figures), headings, LEGEND, left=0)
    for row in figures["rows"]:
        style = None
        if row["n_probes"] == figures["n_probes"]:
            style = "bold"
        table.add_row(
            f"{row['n_probes']}",
            percent(row["agreement"]),
            percent(row["coverage"]),
            f"{row['kl']:.3f}",
            f"{row['perplexity'] / figures['dense_perplexity']:.3f}",
            percent(row["bytes_share"], 1),
            style=style,
        )
    return table


def plot_agreement(figures: dict[str, Any], path: str) -> None:
    """Draws agreement and coverage against the number of probes into a picture.

    Args:
        figures: What `measure_agreement` returns.
        path: The picture to write.
    """
    # It may be absent.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    rows = figures["rows"]
    counts = [row["n_probes"] for row in rows]
    for name in ("agreement", "coverage"):
        shares = [100 * row[name] for row in rows]
        axis.plot(counts, shares, marker="o", label=name)
    axis.axvline(figures["n_probes"], color="tab:gray", linestyle=":", label="as converted")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=f"clusters scored of {figures['n_clusters']:,}", ylabel="% of positions")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
