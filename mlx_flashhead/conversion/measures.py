"""How close the choice of clusters comes to the dense head on held-out states.

- agreement: share of positions whose proposed token is the dense head's best.
- coverage: share of positions whose true next token is among the candidates.
- mass: probability, under the dense head, of the candidates.
- KL: mean divergence of the distribution with the tail from the dense one, in nats.
- perplexity: of the true next tokens, under the distribution with the tail.
- gap, tail: the best candidate's logit less the best score of an unscored cluster, and the log of
  the estimated share of the unscored tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..head.operations import MARGIN_SHARE
from . import Progress, Task
from .checkpoint import NOT_KEPT, Checkpoint, checksum

# So much is measured at once, which bounds memory and the time of a part.
CHUNK_STATES = 32
CHUNK_LOGITS = 1 << 22

LEAST_LOGIT = np.float32(-1e30)
# An estimate is so much over the best logit at most: forced clusters have a huge score.
GREATEST_TAIL = 100.0

# The indices of a position's measures.
AGREEMENT, COVERAGE, MASS, KL, NLL, GAP, TAIL = range(7)

Array = np.ndarray
# A product of states (n, D).
Product = Callable[[Array], Array]


@dataclass(frozen=True)
class PositionMeasures:
    """Measures at each of N positions, for each of P numbers of probes.

    Attributes:
        probe_counts: The numbers of probes.
        values: The measures (P, 7, N) float32, by the indices above.
        dense_perplexity: That of the true next tokens under the dense head.
    """

    probe_counts: Sequence[int]
    values: Array
    dense_perplexity: float

    def means(self) -> list[dict[str, Any]]:
        """The measures over all positions by their names, for each number of probes."""
        means = self.values[:, :GAP].mean(axis=2, dtype=np.float64).tolist()
        by_probes = []
        for n_probes, figures in zip(self.probe_counts, means, strict=True):
            by_probes.append(
                {
                    "n_probes": n_probes,
                    "agreement": figures[AGREEMENT],
                    "coverage": figures[COVERAGE],
                    "mass": figures[MASS],
                    "kl": figures[KL],
                    "perplexity": float(np.exp(figures[NLL])),
                }
            )
        return by_probes


def measure_positions(
    states: Array,
    dense_logits: Product,
    token_ids: Array,
    cluster_scores: Product,
    tail_offset: Array,
    probe_counts: Sequence[int],
    next_ids: Array,
    *,
    checkpoint: Checkpoint = NOT_KEPT,
    source: int = 0,
) -> Task[PositionMeasures]:
    """Measures a way to choose clusters, for several numbers of probes, at each state.

    Args:
        states: Hidden states (N, D) float32.
        dense_logits: The dense head: states (n, D) → logits (n, V) float32.
        token_ids: The clusters (C, cluster_size), with V in padded slots.
        cluster_scores: The choice: states (n, D) → scores of clusters (n, C) float32.
        tail_offset: Makes a cluster's score the logit of one of its tokens (C,).
        probe_counts: Numbers of probes, each 1 … C.
        next_ids: The true next tokens (N,).
        checkpoint: Keeps the measures.
        source: A checksum of the choice that is measured.

    Returns:
        The measures at each state.
    """
    size = max(1, min(CHUNK_STATES, CHUNK_LOGITS // token_ids.size))
    token_ids = token_ids.astype(np.int64)
    # Padded slots come last.
    slots = np.argsort(token_ids.ravel(), kind="stable")
    cluster_of = slots // token_ids.shape[1]
    probes = np.array(probe_counts)
    values = np.empty((len(probes), 7, len(states)), np.float32)
    dense_nll = np.empty(len(states))
    source = checksum(np.array(source), probes, states)
    kept = checkpoint.read("measures", source)
    n_kept = len(kept.get("nll", ()))
    if n_kept:
        values[:, :, :n_kept] = kept["values"]
        dense_nll[:n_kept] = kept["nll"]
    # A bar is there before the first part, which may take long.
    yield Progress("Measuring", n_kept, len(states), kept=True)
    for start in range(n_kept, len(states), size):
        part = slice(start, start + size)
        logits = dense_logits(states[part])
        scores = cluster_scores(states[part])
        measured, dense_nll[part] = _measure_chunk(
            logits, scores, next_ids[part], token_ids, cluster_of, tail_offset, probes
        )
        values[:, :, part] = measured.transpose(2, 0, 1)
        arrays = {"values": values[:, :, : part.stop], "nll": dense_nll[: part.stop]}
        checkpoint.offer("measures", source, partial(dict, arrays))
        yield Progress("Measuring", len(logits), len(states))
    return PositionMeasures(probe_counts, values, float(np.exp(dense_nll.mean())))


class _DenseClusters(NamedTuple):
    """What the dense head gives to clusters; exponentials are relative to the best logit.

    Attributes:
        top: The best logit of all (n,) float64.
        best: The best logit of each cluster (n, C) float32.
        sums: The sum of the exponentials of a cluster's logits (n, C) float64.
        norm: The sum of all exponentials (n,) float64.
        mass: A cluster's probability (n, C) float64.
        mean_logit: The sum of P_v (l_v - top) over a cluster (n, C) float64.
    """

    top: Array
    best: Array
    sums: Array
    norm: Array
    mass: Array
    mean_logit: Array


def _dense_clusters(logits: Array, token_ids: Array) -> _DenseClusters:
    """Sums of the dense logits (n, V) over each cluster."""
    # A padded slot reads a column of -inf and adds nothing to a sum.
    padded = np.pad(logits, ((0, 0), (0, 1)), constant_values=-np.inf)
    blocks = padded[:, token_ids.ravel()].reshape(-1, *token_ids.shape)
    best = blocks.max(-1)
    top = best.max(-1)
    blocks -= top[:, None, None]
    weights = np.exp(blocks)
    sums = weights.sum(-1, dtype=np.float64)
    norm = sums.sum(-1)
    # 0 times -inf would be NaN.
    weights *= np.maximum(blocks, LEAST_LOGIT, out=blocks)
    return _DenseClusters(
        top=top.astype(np.float64),
        best=best,
        sums=sums,
        norm=norm,
        mass=sums / norm[:, None],
        mean_logit=weights.sum(-1, dtype=np.float64) / norm[:, None],
    )


def _measure_chunk(
    logits: Array,
    scores: Array,
    truth: Array,
    token_ids: Array,
    cluster_of: Array,
    tail_offset: Array,
    probes: Array,
) -> tuple[Array, Array]:
    """The measures of some positions, as `measure_positions` has them.

    Args:
        logits: Dense logits (n, V) float32.
        scores: Scores of clusters (n, C) float32.
        truth: The true next tokens (n,).
        token_ids: The clusters (C, cluster_size).
        cluster_of: The cluster of each token (V,), and more for the padded slots.
        tail_offset: Makes a cluster's score the logit of one of its tokens (C,).
        probes: Numbers of probes (P,).

    Returns:
        The measures (7, n, P), and the dense head's losses (n,) float64.
    """
    positions = np.arange(len(logits))
    n_clusters = len(token_ids)
    sizes = (token_ids < logits.shape[1]).sum(1)
    dense = _dense_clusters(logits, token_ids)
    # Estimates (n, C) of the logits of each cluster's tokens, below the best logit.
    tail = np.minimum((scores + tail_offset).astype(np.float64) - dense.top[:, None], GREATEST_TAIL)
    weight = sizes * np.exp(tail)
    moved = dense.mean_logit - dense.mass * tail

    # The best clusters, the best one first; one more is the best that is not scored.
    n_listed = min(int(probes.max()) + 1, n_clusters)
    order = np.argpartition(-scores, n_listed - 1, axis=1)[:, :n_listed]
    ranks = np.argsort(-np.take_along_axis(scores, order, 1), axis=1, kind="stable")
    order = np.take_along_axis(order, ranks, 1)
    # These are of the scored clusters, (n, P): their mass and its estimate, both relative to the
    # best logit, their part of the divergence, their share of the mass, and their best logit.
    parts = np.stack([dense.sums, weight, moved, dense.mass])
    listed = np.take_along_axis(parts, order[None], 2)
    total, estimated, scored_part, scored = listed.cumsum(2)[:, :, probes - 1]
    best = np.maximum.accumulate(np.take_along_axis(dense.best, order, 1), 1)[:, probes - 1]
    best = best.astype(np.float64)
    # These are of the others: the best score, none where all are scored, and the estimates.
    ranked = np.take_along_axis(scores, order, 1).astype(np.float64)
    next_best = np.pad(ranked, ((0, 0), (0, 1)), constant_values=-np.inf)[:, probes]
    unscored = np.maximum(weight.sum(1)[:, None] - estimated, 0.0)
    log_total = np.log(total + unscored)
    divergence = moved.sum(1)[:, None] - scored_part
    # An estimate has this limit in the head, too.
    cap = best - np.maximum(1.0, np.abs(best) * MARGIN_SHARE)
    for i, j in np.argwhere(next_best + tail_offset.max() > cap):
        left = np.ones(n_clusters, bool)
        left[order[i, : probes[j]]] = False
        capped = np.minimum(tail[i, left], cap[i, j] - dense.top[i])
        log_total[i, j] = np.log(total[i, j] + sizes[left] @ np.exp(capped))
        divergence[i, j] = (dense.mean_logit[i, left] - dense.mass[i, left] * capped).sum()

    def is_scored(tokens: Array) -> Array:
        """Whether the clusters of tokens (n,) are scored: (n, P) bool."""
        score = scores[positions, cluster_of[tokens]][:, None]
        return (scores > score).sum(1)[:, None] < probes

    covered = is_scored(truth)
    true_logit = logits[positions, truth].astype(np.float64) - dense.top
    estimate = np.minimum(tail[positions, cluster_of[truth]][:, None], cap - dense.top[:, None])
    # It is the logarithm of 0 where no cluster is left.
    with np.errstate(divide="ignore"):
        log_tail = np.log(unscored / (total + unscored))
    log_norm = np.log(dense.norm)
    measures = (
        is_scored(logits.argmax(1)),
        covered,
        np.minimum(scored, 1.0),
        # Sum over v of P_v (log P_v - log Q_v); probed tokens share the dense head's logit.
        log_total - log_norm[:, None] + divergence,
        log_total - np.where(covered, true_logit[:, None], estimate),
        best - next_best,
        log_tail,
    )
    return np.stack(measures), log_norm - true_logit
