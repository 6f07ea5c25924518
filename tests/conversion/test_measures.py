"""What the measures know of unscored clusters; `test_build.py` compares all with the head."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion import measures, take_all
from mlx_flashhead.conversion.measures import GAP, TAIL, measure_positions
from tiny_models import fitted, random_clusters, random_rows


class Case:
    """A random head, its clusters, states and next tokens; more states than one chunk."""

    def __init__(self, vocab_size=203, cluster_size=8):
        rng = np.random.default_rng(0)
        self.rows = random_rows(rng, vocab_size, 32)
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


@pytest.mark.parametrize("vocab_size, cluster_size", [(64, 8), (40, 1), (30, 30), (37, 16)])
def test_divergence_and_perplexity_of_full_distributions(vocab_size, cluster_size):
    """The head's logits from their definition: `test_build.py` has the other measures."""
    case = Case(vocab_size, cluster_size)
    estimate = (case.scores_of(case.states) + case.tail_offset)[:, case.cluster_of]
    for got in case.positions(sorted({1, min(3, case.n_clusters), case.n_clusters})).means():
        probed = case.probed(got.n_probes)
        best = np.where(probed, case.logits, -np.inf).max(axis=1, keepdims=True)
        cap = best - np.maximum(1, np.abs(best) / 64)
        retrieved = np.where(probed, case.logits, np.minimum(estimate, cap))
        dense, own = (x - np.log(np.exp(x).sum(1)[:, None]) for x in (case.logits, retrieved))
        kl = (np.exp(dense) * (dense - own)).sum(axis=1).mean()
        assert got.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        perplexity = np.exp(-np.take_along_axis(own, case.next_ids[:, None], axis=1).mean())
        assert got.perplexity == pytest.approx(perplexity, rel=1e-5)


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
