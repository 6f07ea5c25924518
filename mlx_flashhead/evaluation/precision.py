"""How close a head with fewer bits comes to full precision, dense and as FlashHead.

Only the head's rows are rounded. Body, text, hidden states, clusters and centroids stay the same.
Every form is compared with the dense head at the checkpoint's own precision, over all V logits, in
chunks.

The forms are those that mlx-lm stores for a 16-bit model: a float32 head is rounded to bfloat16
first. Products are in float32, as MLX's kernels accumulate them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..conversion.calibration import text_states
from ..conversion.measures import tail_logits
from ..head.flash_head import FlashHead
from ..head.formats import AFFINE_BITS, GROUPS, affine_group
from ..head.matrix import Matrix
from ..models.install import installed_head
from ..models.locate import find_head
from .text import FLASH_HEAD, bytes_read, check_probe_counts, row_bytes

DENSE = "dense"
CHUNK_LOGITS = 1 << 23  # logits at once, which bounds memory


@dataclass(frozen=True)
class PrecisionMeasures:
    """One form of the head against the dense head at full precision.

    Attributes:
        head: "dense" or "FlashHead".
        bits: Bits per weight of the rows.
        n_probes: Clusters scored per position; None for dense.
        agreement: Share of positions with the same best token, 0 … 1.
        kl: Mean divergence from the reference's distribution, nats; FlashHead's has the tail.
        perplexity: Of the true next tokens.
        bytes_read: Bytes of weights read per token.
        bytes_share: The same relative to a dense head of 16 bits.
    """

    head: str
    bits: int
    n_probes: int | None
    agreement: float
    kl: float
    perplexity: float
    bytes_read: float
    bytes_share: float


@dataclass(frozen=True)
class PrecisionEvaluation:
    """All forms on one text; the first is the reference.

    Attributes:
        positions: Number of positions.
        n_clusters: Number of clusters.
        measures: One entry for each form.
    """

    positions: int
    n_clusters: int
    measures: list[PrecisionMeasures]

    @property
    def reference(self) -> PrecisionMeasures:
        return self.measures[0]

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


def evaluate_precisions(
    model: nn.Module,
    tokenizer,
    text: str,
    *,
    probe_counts: Sequence[int] | None = None,
    positions: int | None = None,
    progress: bool = True,
) -> PrecisionEvaluation:
    """Measures the head of ``model`` at full, 16, 8 and 4 bits on ``text``.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, with a head of 16 or 32 bits.
        tokenizer: Its tokenizer.
        text: A text that calibration has not seen.
        probe_counts: Numbers of probes, 1 … C; default: the model's own.
        positions: How many positions at most; default: all of the text's.
        progress: Show bars.

    Raises:
        ValueError: If the model has no FlashHead, if its head is quantized or too narrow to be
            quantized, if a number of probes is not valid, or if the text is too short.
    """
    head = installed_head(model)
    rows = head.clustered.token_rows()
    if rows.quantized:
        raise ValueError(
            f"This checkpoint's head has {rows.bits} bits already, so there is no full precision "
            "to compare with: convert the model again with --head-bits 16."
        )
    _group_size(rows)
    probe_counts = check_probe_counts(head, probe_counts or [head.n_probes])
    states, next_ids = text_states(
        model, tokenizer, find_head(model), text, positions=positions, progress=progress
    )
    return PrecisionEvaluation(
        positions=len(states),
        n_clusters=head.n_clusters,
        measures=measure_precisions(head, states, next_ids, probe_counts, progress=progress),
    )


def measure_precisions(
    head: FlashHead,
    states: np.ndarray,
    next_ids: np.ndarray,
    probe_counts: Sequence[int],
    *,
    progress: bool = True,
) -> list[PrecisionMeasures]:
    """Measures all forms of a head: dense ones first, from fine to coarse.

    At most two precisions' rows are held as floats at a time.

    Args:
        head: Not quantized.
        states: (N, D) float32 hidden states.
        next_ids: (N,) true next tokens.
        probe_counts: Numbers of probes, 1 … C.
        progress: Show a bar.
    """
    rows = head.clustered.token_rows()
    forms = list(forms_of(rows))
    kinds = [(DENSE, None), *((FLASH_HEAD, p) for p in probe_counts)]
    reference, retrieval = _Product(rows), _Retrieval(head)
    chunk = max(1, CHUNK_LOGITS // head.vocab_size)
    parts = [slice(start, start + chunk) for start in range(0, len(states), chunk)]
    scores = [np.array(head.cluster_scores(mx.array(states[part]))) for part in parts]
    sums = np.zeros((len(forms), len(kinds), 3))
    bar = tqdm(total=len(forms) * len(parts), desc="Measuring", unit="chunk", disable=not progress)
    for i, form in enumerate(forms):
        product = reference if i == 0 else _Product(form)
        for part, scores_of_part in zip(parts, scores, strict=True):
            exact = reference(states[part])
            logits = exact if i == 0 else product(states[part])
            for row in range(len(exact)):  # one at a time stays in the caches
                view = _ReferenceView(exact[row], next_ids[part][row])
                own = logits[row].astype(np.float64)
                for k, (_, n_probes) in enumerate(kinds):
                    full = own
                    if n_probes is not None:
                        full = retrieval.full_logits(own, scores_of_part[row], n_probes)
                    sums[i, k] += view.compare(full)
            bar.update()
        del product  # before the next one's rows are made
    bar.close()
    of_16_bits = rows.n_rows * 2 * rows.hidden_size
    measures = []
    for k, (name, n_probes) in enumerate(kinds):
        for i, form in enumerate(forms):
            agree, kl, nll = sums[i, k] / len(states)
            read = (
                row_bytes(form) * rows.n_rows
                if n_probes is None
                else bytes_read(head, n_probes, row_bytes(form))
            )
            measures.append(
                PrecisionMeasures(
                    head=name,
                    bits=form.bits or 8 * form.weight.dtype.size,
                    n_probes=n_probes,
                    agreement=float(agree),
                    kl=max(float(kl), 0.0),  # equal forms may round to less than 0
                    perplexity=float(np.exp(nll)),
                    bytes_read=float(read),
                    bytes_share=float(read / of_16_bits),
                )
            )
    return measures


def forms_of(rows: Matrix) -> Iterator[Matrix]:
    """The rows as they are, in 16 bits if they have more, and quantized to 8 and 4 bits.

    Raises:
        ValueError: If no quantization group divides the rows' width.
    """
    yield rows
    if rows.weight.dtype == mx.float32:
        rows = replace(rows, weight=rows.weight.astype(mx.bfloat16))
        yield rows
    group_size = _group_size(rows)
    for bits in reversed(AFFINE_BITS):
        yield rows.quantize(bits=bits, group_size=group_size)


class _Product:
    """Logits of all rows: (n, D) float32 → (n, V) float32."""

    def __init__(self, rows: Matrix):
        self.weight = np.asarray(rows.dequantized(mx.float32))  # no second copy
        self.bias = None if rows.bias is None else np.array(rows.bias.astype(mx.float32))

    def __call__(self, states: np.ndarray) -> np.ndarray:
        logits = states @ self.weight.T
        return logits if self.bias is None else logits + self.bias


class _Retrieval:
    """FlashHead's full logits of one state, made from dense logits and the clusters of ``head``."""

    def __init__(self, head: FlashHead):
        self.token_ids = np.array(head.clustered.token_ids).astype(np.int64)
        self.cluster_of = np.array(head.clustered.slot_of).astype(np.int64) // head.cluster_size
        self.tail_offset = np.array(head.clustered.centroids.tail_offset).astype(np.float64)

    def full_logits(self, logits: np.ndarray, scores: np.ndarray, n_probes: int) -> np.ndarray:
        """(V,) logits and (C,) scores → (V,): estimates for all tokens that are not scored."""
        probes = np.argpartition(-scores, n_probes - 1)[:n_probes]
        ids = self.token_ids[probes].ravel()
        ids = ids[ids < len(logits)]  # without padded slots
        candidates = logits[ids]
        tail = tail_logits(scores[None], self.tail_offset, candidates.max(keepdims=True))[0]
        full = tail[self.cluster_of]
        full[ids] = candidates
        return full


class _ReferenceView:
    """The reference's distribution over all tokens at one state.

    Args:
        logits: (V,).
        truth: The true next token.
    """

    def __init__(self, logits: np.ndarray, truth: int):
        logits = logits.astype(np.float64)
        log_total = _log_total(logits)
        self.truth, self.winner = truth, logits.argmax()
        self.probability = np.exp(logits - log_total)
        self.negative_entropy = self.probability @ logits - log_total

    def compare(self, logits: np.ndarray) -> tuple[float, float, float]:
        """Agreement, KL and negative log-likelihood of other logits, (V,) float64."""
        log_total = _log_total(logits)
        kl = self.negative_entropy - (self.probability @ logits - log_total)
        return logits.argmax() == self.winner, kl, log_total - logits[self.truth]


def _log_total(logits: np.ndarray) -> float:
    best = logits.max()
    return best + np.log(np.exp(logits - best).sum())


def _group_size(rows: Matrix) -> int:
    group_size = affine_group(rows.hidden_size)
    if group_size is not None:
        return group_size
    raise ValueError(
        f"The head's width {rows.hidden_size} is not a multiple of {min(GROUPS)}, so it cannot be "
        "quantized: use evaluate without --precisions."
    )
