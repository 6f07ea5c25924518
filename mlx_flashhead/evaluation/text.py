"""Measures a FlashHead on a text, against the dense head of the same model.

Figures are of the head's output. A model that scales or caps its logits afterwards has the same
agreement and coverage, but another perplexity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..common.pictures import pyplot
from ..common.quantities import percent
from ..common.tables import new_table
from ..conversion.calibration import text_states
from ..conversion.measures import Measures, Routing, measure_positions
from ..head.flash_head import FlashHead
from ..models.install import installed_head
from ..models.locate import find_head

if TYPE_CHECKING:
    from rich.table import Table

LEGEND = """\
agreement   same best token as the dense head
coverage    the true next token is scored
KL          from the dense head's distribution, in nats
perplexity  relative to dense, with the estimates of the tail
bytes       read per token, relative to the dense head"""

USUAL_PROBES = (48, 96, 128, 192, 256, 512)


@dataclass(frozen=True)
class Evaluation:
    """Figures of one text.

    Attributes:
        positions: Number of positions.
        dense_perplexity: Of the true next tokens under the dense head.
        n_probes: The model's own number of probes.
        n_clusters: Number of clusters.
        measures: One entry for each number of probes.
        bytes_share: Bytes read per token relative to the dense head, by number of probes.
    """

    positions: int
    dense_perplexity: float
    n_probes: int
    n_clusters: int
    measures: list[Measures]
    bytes_share: dict[int, float]

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {
            "positions": self.positions,
            "dense_perplexity": self.dense_perplexity,
            "n_probes": self.n_probes,
            "n_clusters": self.n_clusters,
            "rows": [
                measured.to_dict() | {"bytes_share": self.bytes_share[measured.n_probes]}
                for measured in self.measures
            ],
        }


def evaluate(
    model: nn.Module,
    tokenizer,
    text: str,
    *,
    probe_counts: Sequence[int] | None = None,
    positions: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures ``model`` on ``text``.

    Args:
        model: A model loaded by ``mlx_flashhead.load``.
        tokenizer: Its tokenizer.
        text: A text that calibration has not seen.
        probe_counts: Numbers of probes, 1 … C; default: the usual ones and the model's own.
        positions: How many positions at most; default: all of the text's.
        progress: Show bars.

    Raises:
        ValueError: If the model has no FlashHead, a number of probes is not valid, or the text is
            too short.
    """
    head = installed_head(model)
    if probe_counts is None:
        probe_counts = [*(p for p in USUAL_PROBES if p <= head.n_clusters), head.n_probes]
    probe_counts = check_probe_counts(head, probe_counts)
    states, next_ids = text_states(
        model, tokenizer, find_head(model), text, positions=positions, progress=progress
    )
    rows = head.clustered.token_rows()
    weight = np.array(rows.dequantized().astype(mx.float32))
    bias = 0.0 if rows.bias is None else np.array(rows.bias.astype(mx.float32))
    routing = Routing(
        lambda h: np.array(head.cluster_scores(mx.array(h))),
        np.array(head.clustered.centroids.tail_offset),
    )
    measured = measure_positions(
        states,
        lambda h: h @ weight.T + bias,
        np.array(head.clustered.token_ids),
        routing,
        probe_counts,
        next_ids,
        progress=progress,
    )
    return Evaluation(
        positions=len(states),
        dense_perplexity=measured.dense_perplexity(),
        n_probes=head.n_probes,
        n_clusters=head.n_clusters,
        measures=measured.means(),
        bytes_share={p: bytes_share(head, p) for p in probe_counts},
    )


def check_probe_counts(head: FlashHead, probe_counts: Sequence[int]) -> list[int]:
    """The numbers of probes, each once and ascending.

    Raises:
        ValueError: If one of them is not 1 … C.
    """
    probe_counts = sorted(set(probe_counts))
    for n_probes in probe_counts:
        if not 1 <= n_probes <= head.n_clusters:
            raise ValueError(
                f"{n_probes} probes are not possible: this model has {head.n_clusters} clusters, "
                f"so choose 1 to {head.n_clusters}."
            )
    return probe_counts


def bytes_share(head: FlashHead, n_probes: int) -> float:
    """Bytes of weights read per token, stage 1 and p clusters, relative to the dense head."""
    rows = head.clustered.rows
    bytes_per_row = rows.nbytes / (head.n_clusters * head.cluster_size)
    read = head.clustered.centroids.routing_bytes + n_probes * head.cluster_size * bytes_per_row
    return read / (bytes_per_row * head.vocab_size)


def make_table(evaluation: Evaluation) -> "Table":
    """A line for each number of probes, the model's own in bold."""
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_clusters} clusters, "
        f"dense perplexity {evaluation.dense_perplexity:.2f}",
        ("probes", "agreement", "coverage", "KL", "perplexity", "bytes"),
        LEGEND,
        left=0,
    )
    for measured in evaluation.measures:
        table.add_row(
            f"{measured.n_probes}",
            percent(measured.agreement),
            percent(measured.coverage),
            f"{measured.kl:.3f}",
            f"{measured.perplexity / evaluation.dense_perplexity:.3f}",
            percent(evaluation.bytes_share[measured.n_probes], 1),
            style="bold" if measured.n_probes == evaluation.n_probes else None,
        )
    return table


def draw(evaluation: Evaluation, path: str) -> None:
    """Draws agreement and coverage against the number of probes into a picture."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    probes = [measured.n_probes for measured in evaluation.measures]
    for name, label in (
        ("agreement", "same best token as the dense head"),
        ("coverage", "true next token scored"),
    ):
        shares = [100 * getattr(measured, name) for measured in evaluation.measures]
        axis.plot(probes, shares, marker="o", label=label)
    axis.axvline(evaluation.n_probes, color="tab:gray", linestyle=":", label="as converted")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=f"clusters scored of {evaluation.n_clusters:,}", ylabel="% of positions")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
