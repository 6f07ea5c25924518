"""Measures a FlashHead model on a text, beside the paper's routing on the same clusters.

The paper's clusters follow the rows' directions, as those of a conversion without calibration do.
Measure the paper's routing on such clusters.

Figures are of the head's output. A model that scales or caps its logits afterwards has the same
agreement and coverage, but another perplexity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..conversion.calibration import text_states
from ..conversion.fitting import unit_means
from ..conversion.measures import USUAL_PROBES, Measures, Routing, measure
from ..head.flash_head import FlashHead
from ..head.matrix import Matrix
from ..models.install import installed_head
from ..models.locate import find_head

FLASH_HEAD, UNIT_MEANS = "FlashHead", "unit means"


@dataclass(frozen=True)
class Evaluation:
    """Figures of one text.

    Attributes:
        positions: Number of positions.
        dense_perplexity: Of the true next tokens under the dense head.
        n_probes: The checkpoint's own number of probes.
        n_clusters: Number of clusters.
        measures: One entry for each routing and number of probes.
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
        rows = [
            measured.to_dict() | {"bytes_share": self.bytes_share[measured.n_probes]}
            for measured in self.measures
        ]
        return {
            "positions": self.positions,
            "dense_perplexity": self.dense_perplexity,
            "n_probes": self.n_probes,
            "n_clusters": self.n_clusters,
            "rows": rows,
        }


def evaluate(
    model: nn.Module,
    tokenizer,
    text: str,
    *,
    probe_counts: Sequence[int] | None = None,
    positions: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measures ``model`` on ``text``.

    Args:
        model: A model loaded by ``mlx_flashhead.load``.
        tokenizer: Its tokenizer.
        text: A text that calibration has not seen.
        probe_counts: Numbers of probes, 1 … C; default: the usual ones and the model's own.
        positions: How many positions at most; default: all of the text's.
        seed: Seed of the drawn probes.
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
    token_ids = np.array(head.clustered.token_ids)
    rows = head.clustered.token_rows()
    weight = np.array(rows.dequantized().astype(mx.float32))
    bias = 0.0 if rows.bias is None else np.array(rows.bias.astype(mx.float32))
    paper_centroids = _as_stage_1(unit_means(weight, token_ids), head)
    routings = [
        Routing(
            FLASH_HEAD,
            lambda h: np.array(head.cluster_scores(mx.array(h))),
            np.array(head.clustered.centroids.tail_offset),
            drawn=True,
        ),
        Routing(UNIT_MEANS, lambda h: h @ paper_centroids.T, None),
    ]
    measures, dense_perplexity = measure(
        states,
        lambda h: h @ weight.T + bias,
        token_ids,
        routings,
        probe_counts,
        next_ids,
        seed=seed,
        progress=progress,
    )
    return Evaluation(
        positions=len(states),
        dense_perplexity=dense_perplexity,
        n_probes=head.n_probes,
        n_clusters=head.n_clusters,
        measures=measures,
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
                f"--probes {n_probes} is not possible: this model has {head.n_clusters} clusters, "
                f"so choose 1 to {head.n_clusters}."
            )
    return probe_counts


def row_bytes(rows: Matrix) -> float:
    """Bytes that are stored for each row."""
    return rows.nbytes / math.prod(rows.weight.shape[:-1])


def bytes_read(head: FlashHead, n_probes: int, bytes_per_row: float) -> float:
    """Bytes of weights read per token with rows of a given size: stage 1 + p clusters."""
    routing_bytes = head.clustered.centroids.routing_bytes
    return routing_bytes + n_probes * head.cluster_size * bytes_per_row


def bytes_share(head: FlashHead, n_probes: int) -> float:
    """Bytes of weights read per token, relative to the dense head."""
    bytes_per_row = row_bytes(head.clustered.rows)
    return bytes_read(head, n_probes, bytes_per_row) / (bytes_per_row * head.vocab_size)


def _as_stage_1(centroids: np.ndarray, head: FlashHead) -> np.ndarray:
    """Other centroids at the precision of the head's own, rounded to nearest."""
    own = head.clustered.centroids.matrix
    if not own.quantized:
        return centroids
    rounded = Matrix(mx.array(centroids)).quantize(**own.quantization)
    return np.array(rounded.dequantized())
