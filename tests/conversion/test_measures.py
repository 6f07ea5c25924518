"""The measures, against full distributions over the vocabulary and against the FlashHead itself."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion import measures
from mlx_flashhead.conversion.measures import GAP, TAIL, measure_positions
from mlx_flashhead.conversion.steps import take_all
from tiny_models import fitted, random_clusters, random_rows

# V, cluster_size; the last three do not divide
SHAPES = [(64, 8), (40, 1), (30, 30), (203, 8), (37, 16), (101, 3)]


class Case:
    """A random head, its clusters, states and next tokens; more states than one chunk."""

    def __init__(self, vocab_size=203, cluster_size=8, *, bias=False):
        rng = np.random.default_rng(0)
        self.rows = random_rows(rng, vocab_size, 32, bias=bias)
        self.token_ids = random_clusters(rng, vocab_size, cluster_size)
        self.n_clusters = len(self.token_ids)
        self.centroids = fitted(self.rows, self.token_ids)
        self.states = rng.normal(size=(150, 32)).astype(np.float32)
        self.logits = self.logits_of(self.states).astype(np.float64)
        self.next_ids = (self.logits + rng.gumbel(size=self.logits.shape)).argmax(axis=1)
        self.tail_offset = np.array(self.centroids.tail_offset)
        self.cluster_of = np.empty(vocab_size, int)
        for cluster, ids in enumerate(self.token_ids.tolist()):
            self.cluster_of[[i for i in ids if i < vocab_size]] = cluster

    def logits_of(self, states):
        return np.array(self.rows.matmul(mx.array(states)))

    def scores_of(self, states):
        matrix = np.array(self.centroids.matrix.dequantized(mx.float32))
        return states @ matrix.T + np.array(self.centroids.bias)

    def positions(self, probe_counts):
        return take_all(
            measure_positions(
                self.states,
                self.logits_of,
                self.token_ids,
                self.scores_of,
                self.tail_offset,
                probe_counts,
                self.next_ids,
            )
        )

    def probed(self, n_probes):
        """(N, V) bool: the tokens of each state's best clusters."""
        order = np.argsort(-self.scores_of(self.states), axis=1, kind="stable")
        chosen = np.zeros((len(self.states), self.n_clusters), bool)
        np.put_along_axis(chosen, order[:, :n_probes], True, axis=1)
        return chosen[:, self.cluster_of]

    def retrieved_logits(self, n_probes):
        """(N, V) logits with the tail, from their definition."""
        probed = self.probed(n_probes)
        best = np.where(probed, self.logits, -np.inf).max(axis=1, keepdims=True)
        estimate = (self.scores_of(self.states) + self.tail_offset)[:, self.cluster_of]
        cap = best - np.maximum(1, np.abs(best) / 64)
        return np.where(probed, self.logits, np.minimum(estimate, cap))


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl(logits, retrieved):
    """Mean divergence of the distribution of ``retrieved`` from that of ``logits``."""
    dense, own = log_softmax(logits), log_softmax(retrieved)
    return (np.exp(dense) * (dense - own)).sum(axis=1).mean()


def perplexity(logits, next_ids):
    return np.exp(-np.take_along_axis(log_softmax(logits), next_ids[:, None], axis=1).mean())


def probe_counts(n_clusters):
    return sorted({1, min(3, n_clusters), max(1, n_clusters // 2), n_clusters})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("vocab_size", "cluster_size"), SHAPES)
def test_measures_of_full_distributions(vocab_size, cluster_size, bias):
    case = Case(vocab_size, cluster_size, bias=bias)
    rows = np.arange(len(case.states))
    found = case.positions(probe_counts(case.n_clusters))
    dense = found.dense_perplexity()
    assert dense == pytest.approx(perplexity(case.logits, case.next_ids), rel=1e-5)
    for got in found.means():
        probed, retrieved = case.probed(got.n_probes), case.retrieved_logits(got.n_probes)
        assert got.agreement == pytest.approx(probed[rows, case.logits.argmax(axis=1)].mean())
        assert got.agreement == (retrieved.argmax(axis=1) == case.logits.argmax(axis=1)).mean()
        assert got.coverage == pytest.approx(probed[rows, case.next_ids].mean())
        mass = (np.exp(log_softmax(case.logits)) * probed).sum(axis=1).mean()
        assert got.covered_mass == pytest.approx(mass, rel=1e-6)
        assert got.kl == pytest.approx(kl(case.logits, retrieved), rel=1e-4, abs=1e-6)
        assert got.perplexity == pytest.approx(perplexity(retrieved, case.next_ids), rel=1e-5)


def test_gap_and_tail_are_what_the_head_knows_of_its_unscored_clusters():
    case = Case()
    found = case.positions([3, case.n_clusters])
    scores = np.sort(case.scores_of(case.states), axis=1)[:, ::-1].astype(np.float64)
    scored = np.where(case.probed(3), case.logits, -np.inf)
    gap, tail = found.values[0, GAP], found.values[0, TAIL]
    np.testing.assert_allclose(gap, scored.max(axis=1) - scores[:, 3], atol=1e-4)
    rest = np.log(np.exp(scores[:, 3:]).sum(axis=1))
    total = np.logaddexp(np.log(np.exp(scored).sum(axis=1)), rest)
    np.testing.assert_allclose(tail, rest - total, atol=1e-4)
    assert (found.values[1, GAP] == np.inf).all()  # no cluster is left
    assert (found.values[1, TAIL] < -25).all()


def test_a_model_s_own_minus_infinity():
    """Tokens that the model rules out have no mass, and no measure is spoilt."""
    case = Case(64, 8)
    ruled_out = case.token_ids[0, :5]
    logits_of = case.logits_of

    def with_holes(states):
        logits = logits_of(states)
        logits[:, ruled_out] = -np.inf
        return logits

    case.logits_of = with_holes
    case.next_ids = np.full(len(case.states), case.token_ids[1, 0])
    found = case.positions([3, 8])
    got, whole = found.means()
    assert np.isfinite([*got, found.dense_perplexity()]).all()
    assert whole.kl == pytest.approx(0, abs=1e-7)


def test_large_vocabularies_are_measured_in_smaller_chunks(monkeypatch):
    case = Case()
    expected = case.positions([3])
    sizes = []

    def logits_of(states):
        sizes.append(len(states))
        return np.array(case.rows.matmul(mx.array(states)))

    monkeypatch.setattr(measures, "CHUNK_LOGITS", 4 * case.token_ids.size - 1)
    monkeypatch.setattr(case, "logits_of", logits_of)
    found = case.positions([3])
    assert set(sizes) == {3}
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-4)
