"""How close retrieval comes to the dense head, on given hidden states.

All measures follow from a few sums per cluster, so one pass over the dense logits serves any number
of probe counts.

- agreement: share of positions whose best token is the dense head's.
- coverage: share of positions whose true next token is among the candidates.
- covered mass: mean probability, under the dense head, of the candidates.
- KL: mean divergence of the distribution with the tail from the dense one, in nats.
- perplexity: of the true next tokens, under the distribution with the tail.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from ..head.portable import MARGIN_SHARE

USUAL_PROBES = (48, 96, 128, 192, 256, 512)
CHUNK_STATES, CHUNK_LOGITS = 128, 1 << 23  # at once, which bounds memory
DRAWS = 32
# Negative log-likelihood of a token that cannot be drawn, because the clusters that are always
# probed leave no room for its own.
LEAST_PROBABILITY = 1e-12
LEAST_LOGIT = np.float32(-1e30)
# Places of a position's measures.
AGREEMENT, COVERAGE, MASS, KL, NLL, DRAWN_NLL = range(6)


@dataclass(frozen=True)
class Measures:
    """Measures of one routing at one number of probes.

    Attributes:
        routing: Name of the routing.
        n_probes: Clusters scored per position.
        agreement: Share of positions, 0 … 1.
        coverage: Share of positions, 0 … 1; NaN without true next tokens.
        covered_mass: Mean probability, 0 … 1.
        kl: Nats per position.
        perplexity: With the tail; NaN without true next tokens.
        drawn_perplexity: With probes drawn by probability; NaN if not measured.
    """

    routing: str
    n_probes: int
    agreement: float
    coverage: float
    covered_mass: float
    kl: float
    perplexity: float
    drawn_perplexity: float = float("nan")

    def to_dict(self) -> dict:
        """JSON-ready; a missing measure is None."""
        return {k: None if v != v else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Routing:
    """A way to choose clusters.

    Attributes:
        name: Shown in tables.
        scores: Hidden states (N, D) float32 → scores (N, C) float32.
        tail_offset: (C,) float32, or None if the tokens of other clusters have no estimate.
        drawn: Whether to measure sampling with probes drawn by probability too.
    """

    name: str
    scores: Callable[[np.ndarray], np.ndarray]
    tail_offset: np.ndarray | None
    drawn: bool = False


class PositionMeasures:
    """Measures at each of N positions, for each routing and number of probes.

    Attributes:
        values: (routings, probe counts, 6, N) float32: agreement, coverage, covered mass, KL, and
            the true next token's negative log-likelihood, with the tail and with drawn probes. NaN
            stands for a missing measure.
        dense_nll: (N,) float64, under the dense head; None without true next tokens.
    """

    def __init__(
        self,
        routings: Sequence[Routing],
        probe_counts: Sequence[int],
        n_positions: int,
        known: bool,
    ):
        self.routings, self.probe_counts = tuple(routings), tuple(probe_counts)
        shape = (len(self.routings), len(self.probe_counts), 6, n_positions)
        self.values = np.full(shape, np.nan, np.float32)
        self.dense_nll = np.zeros(n_positions) if known else None

    def means(self, chosen: np.ndarray | slice = slice(None)) -> list[Measures]:
        """The measures over the ``chosen`` positions, routing by routing."""
        return [
            self._mean(routing, n_probes, values[:, chosen])
            for routing, by_probes in zip(self.routings, self.values, strict=True)
            for n_probes, values in zip(self.probe_counts, by_probes, strict=True)
        ]

    def dense_perplexity(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """Over the ``chosen`` positions; NaN without true next tokens."""
        return math.nan if self.dense_nll is None else _exp(self.dense_nll[chosen].mean())

    @staticmethod
    def _mean(routing: Routing, n_probes: int, values: np.ndarray) -> Measures:
        agree, covered, mass, kl, nll, drawn = values.mean(axis=1, dtype=np.float64)
        return Measures(
            routing=routing.name,
            n_probes=n_probes,
            agreement=float(agree),
            coverage=float(covered),
            covered_mass=float(mass),
            kl=float(kl),
            perplexity=_exp(nll),
            drawn_perplexity=_exp(drawn),
        )


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def measure_positions(
    states: np.ndarray,
    logits_of: Callable[[np.ndarray], np.ndarray],
    token_ids: np.ndarray,
    routings: Sequence[Routing],
    probe_counts: Sequence[int],
    next_ids: np.ndarray | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> PositionMeasures:
    """Measures each routing at each number of probes and position.

    Args:
        states: (N, D) float32 hidden states.
        logits_of: Dense logits of some states: (n, D) → (n, V) float32, token order.
        token_ids: (C, cluster_size) integers, V in padded slots.
        routings: Ways to choose clusters.
        probe_counts: Numbers of probes, 1 … C.
        next_ids: (N,) true next tokens, or None.
        seed: Seed of the draws.
        progress: Show a bar.
    """
    size = max(1, min(CHUNK_STATES, CHUNK_LOGITS // token_ids.size))
    rng = np.random.default_rng(seed)
    found = PositionMeasures(routings, probe_counts, len(states), next_ids is not None)
    clusters = np.arange(len(token_ids))[None]
    for start in tqdm(
        range(0, len(states), size), desc="Measuring", unit="chunk", disable=not progress
    ):
        part = slice(start, start + size)
        chunk, truth = states[part], None if next_ids is None else next_ids[part]
        view = _DenseView(logits_of(chunk), token_ids, truth)
        if found.dense_nll is not None:
            found.dense_nll[part] = view.log_total - view.truth_logit
        for routing, values in zip(routings, found.values, strict=True):
            scores = routing.scores(chunk)
            order = np.argsort(-scores, axis=1, kind="stable")
            ranks = np.empty_like(order)
            np.put_along_axis(ranks, order, clusters, axis=1)
            for n_probes, measured in zip(probe_counts, values, strict=True):
                measured[:DRAWN_NLL, part] = view.compare(
                    scores, ranks < n_probes, routing.tail_offset
                )
            if routing.drawn and truth is not None:
                drawn = view.drawn_nll(scores, probe_counts, rng)
                for n_probes, measured in zip(probe_counts, values, strict=True):
                    measured[DRAWN_NLL, part] = drawn[n_probes]
    return found


def measure(*args, **kwargs) -> tuple[list[Measures], float]:
    """The measures over all positions, routing by routing, and the dense perplexity.

    The arguments are those of :func:`measure_positions`. Without true next tokens the perplexity is
    NaN.
    """
    found = measure_positions(*args, **kwargs)
    return found.means(), found.dense_perplexity()


def tail_logits(scores: np.ndarray, tail_offset: np.ndarray, best: np.ndarray) -> np.ndarray:
    """The estimate of `portable.py` for the tokens of each cluster that is not probed.

    Args:
        scores: (n, C).
        tail_offset: (C,).
        best: (n,) logits of the best candidates.

    Returns:
        (n, C).
    """
    cap = best - np.maximum(1.0, np.abs(best) * MARGIN_SHARE)
    return np.minimum(scores + tail_offset, cap[:, None])


class _DenseView:
    """The dense logits of some states, summed up per cluster.

    Shapes: (n, C) per cluster, (n,) per state.
    """

    def __init__(self, logits: np.ndarray, token_ids: np.ndarray, truth: np.ndarray | None):
        n_rows, vocab_size = logits.shape
        self.rows = np.arange(n_rows)
        flat = token_ids.reshape(-1).astype(np.int64)
        cluster_of = np.empty(vocab_size, np.int64)
        real = flat < vocab_size
        cluster_of[flat[real]] = np.flatnonzero(real) // token_ids.shape[1]
        self.sizes = (token_ids < vocab_size).sum(1)
        # a padded slot reads a column of -inf and adds nothing to a sum
        padded = np.concatenate([logits, np.full((n_rows, 1), -np.inf, logits.dtype)], axis=1)
        blocks = padded[:, flat].reshape(n_rows, *token_ids.shape)
        best = blocks.max(-1)  # (n, C)
        self.best, self.total_max = best.astype(np.float64), best.max(-1).astype(np.float64)
        blocks -= best.max(-1)[:, None, None]
        weights = np.exp(blocks)
        cluster_sum = weights.sum(-1, dtype=np.float64)
        norm = cluster_sum.sum(-1)
        self.log_total = self.total_max + np.log(norm)
        self.mass = cluster_sum / norm[:, None]  # probability of each cluster
        weights *= np.maximum(blocks, LEAST_LOGIT, out=blocks)  # 0 times -inf would be NaN
        # sum of P_v l_v
        self.mean_logit = weights.sum(-1, dtype=np.float64) / norm[:, None]
        self.mean_logit += self.mass * self.total_max[:, None]
        self.cluster_sum = cluster_sum
        self.winner = cluster_of[logits.argmax(1)]
        self.truth_logit = None
        if truth is not None:
            self.truth_logit = logits[self.rows, truth].astype(np.float64)
            self.truth_cluster = cluster_of[truth]

    def compare(
        self, scores: np.ndarray, probed: np.ndarray, tail_offset: np.ndarray | None
    ) -> np.ndarray:
        """Agreement, coverage, mass, KL and negative log-likelihood of each state, (5, n).

        NaN stands for an unknown value.
        """
        result = np.full((5, len(self.rows)), np.nan)
        result[AGREEMENT] = probed[self.rows, self.winner]
        result[MASS] = (self.mass * probed).sum(-1)
        if self.truth_logit is not None:
            found = probed[self.rows, self.truth_cluster]
            result[COVERAGE] = found
        if tail_offset is None:
            return result
        best = np.where(probed, self.best, -np.inf).max(-1)
        tail = tail_logits(scores, tail_offset, best)
        weight = self.sizes * np.exp(tail - self.total_max[:, None])
        log_total = self.total_max + np.log(np.where(probed, self.cluster_sum, weight).sum(-1))
        # sum over v of P_v (log P_v - log Q_v); probed tokens share their logit with the dense head
        moved = np.where(probed, 0.0, self.mean_logit - self.mass * tail).sum(-1)
        result[KL] = log_total - self.log_total + moved
        if self.truth_logit is not None:
            estimate = tail[self.rows, self.truth_cluster]
            result[NLL] = log_total - np.where(found, self.truth_logit, estimate)
        return result

    def drawn_nll(
        self, scores: np.ndarray, probe_counts: Sequence[int], rng: np.random.Generator
    ) -> dict[int, np.ndarray]:
        """Negative log-likelihood when probes are drawn by Gumbel noise, averaged over draws.

        Noise is drawn for all clusters but the true token's. That cluster is probed, beside the
        first p - 1 others, if it exceeds the p-th of them, which has a known probability. A token's
        probability therefore does not depend on a lucky draw. All numbers of probes share the
        noise.

        Returns:
            Number of probes → one of each state, (n,).
        """
        n_listed = min(max(probe_counts), scores.shape[1])
        own_score = scores[self.rows, self.truth_cluster]
        own_sum = self.cluster_sum[self.rows, self.truth_cluster]
        own_weight = np.exp(self.truth_logit - self.total_max)
        probability = {n_probes: np.zeros(len(scores)) for n_probes in probe_counts}
        for _ in range(DRAWS):
            drawn = rng.standard_exponential(scores.shape, dtype=np.float32)
            noise = -np.log(np.maximum(drawn, np.finfo(drawn.dtype).tiny))  # Gumbel; 0 is drawn too
            others = scores + noise
            others[self.rows, self.truth_cluster] = -np.inf
            listed = np.argpartition(-others, n_listed - 1, axis=1)[:, :n_listed]
            found = np.take_along_axis(others, listed, axis=1)
            order = np.argsort(-found, axis=1)
            thresholds = np.take_along_axis(found, order, axis=1)
            listed = np.take_along_axis(listed, order, axis=1)
            totals = np.cumsum(np.take_along_axis(self.cluster_sum, listed, axis=1), axis=1)
            for n_probes, sum_of_draws in probability.items():
                # P(own score + Gumbel > threshold); beyond 50 it is 1
                ahead = np.minimum(own_score - thresholds[:, n_probes - 1], 50)
                total = own_sum + (totals[:, n_probes - 2] if n_probes > 1 else 0.0)
                sum_of_draws += -np.expm1(-np.exp(ahead)) * own_weight / total
        return {
            n_probes: -np.log(np.maximum(total / DRAWS, LEAST_PROBABILITY))
            for n_probes, total in probability.items()
        }
