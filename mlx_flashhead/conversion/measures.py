"""How close retrieval comes to the dense head, on given hidden states.

- agreement: share of positions whose best token is the dense head's.
- coverage: share of positions whose true next token is among the candidates.
- covered mass: mean probability, under the dense head, of the candidates.
- KL: mean divergence of the distribution with the tail from the dense one, in nats.
- perplexity: of the true next tokens, under the distribution with the tail.
- gap, tail: the best candidate's logit less the best score of an unscored cluster, and the log of
  the estimated share of the unscored tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..head.portable import MARGIN_SHARE
from .steps import Step, Steps

CHUNK_STATES, CHUNK_LOGITS = 32, 1 << 22  # at once, which bounds memory and the time of a step
LEAST_LOGIT = np.float32(-1e30)
GREATEST_TAIL = 100.0  # of an estimate over the best logit: forced clusters have a huge score
# Places of a position's measures.
AGREEMENT, COVERAGE, MASS, KL, NLL, GAP, TAIL = range(7)

Products = Callable[[np.ndarray], np.ndarray]


class Measures(NamedTuple):
    n_probes: int
    agreement: float  # share of positions, as the next
    coverage: float
    covered_mass: float
    kl: float  # nats per position
    perplexity: float  # with the tail


@dataclass(frozen=True)
class PositionMeasures:
    """Measures at each of N positions, for each of P numbers of probes."""

    probe_counts: Sequence[int]
    values: np.ndarray  # (P, 7, N) float32, by the places above
    dense_nll: np.ndarray  # (N,) float64, of the true next tokens under the dense head

    def means(self) -> list[Measures]:
        """The measures over all positions, by number of probes."""
        means = self.values[:, :GAP].mean(axis=2, dtype=np.float64).tolist()
        of_probes = zip(self.probe_counts, means, strict=True)
        return [Measures._make([n, *shares, _exp(nll)]) for n, (*shares, nll) in of_probes]

    def dense_perplexity(self) -> float:
        """Of the true next tokens, over all positions."""
        return _exp(self.dense_nll.mean())


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def measure_positions(
    states: np.ndarray,
    logits_of: Products,
    token_ids: np.ndarray,
    scores_of: Products,
    tail_offset: np.ndarray,
    probe_counts: Sequence[int],
    next_ids: np.ndarray,
) -> Steps[PositionMeasures]:
    """Measures a way to choose clusters at each number of probes (1 … C) and each state (N, D).

    ``logits_of`` gives dense logits (n, D) → (n, V), ``scores_of`` scores of clusters (n, C),
    float32. ``tail_offset`` (C,) makes a score the logit of a token. ``token_ids`` are V in padded
    slots.
    """
    size = max(1, min(CHUNK_STATES, CHUNK_LOGITS // token_ids.size))
    values = np.empty((len(probe_counts), 7, len(states)), np.float32)
    dense_nll = np.empty(len(states))
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        chunk = states[part]
        logits, scores = logits_of(chunk), scores_of(chunk)
        values[:, :, part], dense_nll[part] = _compare(
            logits, token_ids, scores, tail_offset, np.array(probe_counts), next_ids[part]
        )
        yield Step("Measuring", start + len(chunk), len(states), "position")
    return PositionMeasures(probe_counts, values, dense_nll)


def _compare(
    logits: np.ndarray,
    token_ids: np.ndarray,
    scores: np.ndarray,
    tail_offset: np.ndarray,
    probes: np.ndarray,
    truth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """All measures (P, 7, n) from dense logits (n, V) and scores (n, C) of the clusters, and the
    dense head's negative log-likelihoods (n,) of the true tokens."""
    (n_rows, vocab_size), n_clusters = logits.shape, len(token_ids)
    rows = np.arange(n_rows)
    flat = token_ids.reshape(-1).astype(np.int64)
    real = flat < vocab_size
    cluster_of = np.empty(vocab_size, np.int64)
    cluster_of[flat[real]] = np.flatnonzero(real) // token_ids.shape[1]
    sizes = (token_ids < vocab_size).sum(1)
    # a padded slot reads a column of -inf and adds nothing to a sum
    padded = np.concatenate([logits, np.full((n_rows, 1), -np.inf, logits.dtype)], axis=1)
    blocks = padded[:, flat].reshape(n_rows, *token_ids.shape)
    best_of = blocks.max(-1)  # (n, C), as what follows
    top = best_of.max(-1)
    blocks -= top[:, None, None]
    weights = np.exp(blocks)
    cluster_sum = weights.sum(-1, dtype=np.float64)
    norm = cluster_sum.sum(-1)
    top = top.astype(np.float64)
    mass = cluster_sum / norm[:, None]  # probability of each cluster
    weights *= np.maximum(blocks, LEAST_LOGIT, out=blocks)  # 0 times -inf would be NaN
    mean_logit = weights.sum(-1, dtype=np.float64) / norm[:, None]  # sum of P_v (l_v - top)

    listed = min(int(probes.max()) + 1, n_clusters)  # one more, the best that is not scored
    order = np.argpartition(-scores, listed - 1, axis=1)[:, :listed]
    order = np.take_along_axis(
        order, np.argsort(-np.take_along_axis(scores, order, 1), axis=1, kind="stable"), 1
    )

    def scored(values: np.ndarray) -> np.ndarray:
        """Sums (n, P) of values (n, C) over the scored clusters."""
        return np.take_along_axis(values, order, 1).cumsum(1)[:, probes - 1]

    def holds(token: np.ndarray) -> np.ndarray:
        """Whether a token of each state is scored, (n, P)."""
        own = scores[rows, cluster_of[token]][:, None]
        return (scores > own).sum(1)[:, None] < probes

    tail = np.minimum((scores + tail_offset).astype(np.float64) - top[:, None], GREATEST_TAIL)
    weight = sizes * np.exp(tail)
    moved = mean_logit - mass * tail
    best = np.maximum.accumulate(np.take_along_axis(best_of, order, 1), 1)[:, probes - 1]
    best = best.astype(np.float64)
    total = scored(cluster_sum)
    unscored = np.maximum(weight.sum(1)[:, None] - scored(weight), 0.0)
    log_total = np.log(total + unscored)
    divergence = moved.sum(1)[:, None] - scored(moved)
    # the best score among the unscored clusters; none is left where all are scored
    next_best = np.full(best.shape, -np.inf)
    some = probes < n_clusters
    next_best[:, some] = np.take_along_axis(scores, order, 1)[:, probes[some]]
    cap = best - np.maximum(1.0, np.abs(best) * MARGIN_SHARE)  # of an estimate, as in the head
    for i, j in np.argwhere(next_best + tail_offset.max() > cap):
        left = np.ones(n_clusters, bool)
        left[order[i, : probes[j]]] = False
        capped = np.minimum(tail[i, left], cap[i, j] - top[i])
        log_total[i, j] = np.log(total[i, j] + sizes[left] @ np.exp(capped))
        divergence[i, j] = (mean_logit[i, left] - mass[i, left] * capped).sum()

    own = logits[rows, truth].astype(np.float64) - top
    estimate = np.minimum(tail[rows, cluster_of[truth]][:, None], cap - top[:, None])
    found = np.empty((7, *best.shape))
    found[AGREEMENT] = holds(logits.argmax(1))
    found[COVERAGE] = holds(truth)
    found[MASS] = np.minimum(scored(mass), 1.0)
    # sum over v of P_v (log P_v - log Q_v); probed tokens share their logit with the dense head
    found[KL] = log_total - np.log(norm)[:, None] + divergence
    found[NLL] = log_total - np.where(holds(truth), own[:, None], estimate)
    found[GAP] = best - next_best
    with np.errstate(divide="ignore"):  # no cluster is left
        found[TAIL] = np.log(unscored / (total + unscored))
    return found.transpose(2, 0, 1), np.log(norm) - own
