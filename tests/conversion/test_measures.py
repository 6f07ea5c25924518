"""The measures, against full distributions over the vocabulary and against the FlashHead itself."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion import measures
from mlx_flashhead.conversion.measures import Measures, Routing, measure
from mlx_flashhead.head.flash_head import FlashHead
from tiny_models import fitted, random_clusters, random_rows

# V, cluster_size; the last three do not divide
SHAPES = [(64, 8), (40, 1), (30, 30), (203, 8), (37, 16), (101, 3)]


class Case:
    """A random head, its clusters, states and next tokens; more states than one chunk."""

    def __init__(
        self, vocab_size=203, cluster_size=8, *, bias=False, n_states=150, scale=1, seed=0
    ):
        rng = np.random.default_rng(seed)
        self.rows = random_rows(rng, vocab_size, 32, bias=bias)
        self.token_ids = random_clusters(rng, vocab_size, cluster_size)
        self.n_clusters = len(self.token_ids)
        self.centroids = fitted(self.rows, self.token_ids)
        self.states = rng.normal(scale=scale, size=(n_states, 32)).astype(np.float32)
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

    def routing(self, **kwargs):
        return Routing("own", self.scores_of, self.tail_offset, **kwargs)

    def measure(self, routing, n_probes, next_ids="own", **kwargs):
        next_ids = self.next_ids if isinstance(next_ids, str) else next_ids
        (result,), dense = measure(
            self.states,
            self.logits_of,
            self.token_ids,
            [routing],
            [n_probes],
            next_ids,
            progress=False,
            **kwargs,
        )
        return result, dense

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
    for n_probes in probe_counts(case.n_clusters):
        got, dense = case.measure(case.routing(), n_probes)
        probed, retrieved = case.probed(n_probes), case.retrieved_logits(n_probes)
        assert (got.routing, got.n_probes) == ("own", n_probes)
        assert got.agreement == pytest.approx(probed[rows, case.logits.argmax(axis=1)].mean())
        assert got.agreement == (retrieved.argmax(axis=1) == case.logits.argmax(axis=1)).mean()
        assert got.coverage == pytest.approx(probed[rows, case.next_ids].mean())
        mass = (np.exp(log_softmax(case.logits)) * probed).sum(axis=1).mean()
        assert got.covered_mass == pytest.approx(mass, rel=1e-6)
        assert got.kl == pytest.approx(kl(case.logits, retrieved), rel=1e-4, abs=1e-6)
        assert got.perplexity == pytest.approx(perplexity(retrieved, case.next_ids), rel=1e-5)
        assert dense == pytest.approx(perplexity(case.logits, case.next_ids), rel=1e-5)
        assert np.isnan(got.drawn_perplexity)


@pytest.mark.parametrize(("vocab_size", "cluster_size"), [(203, 8), (37, 16), (64, 8)])
def test_measures_are_those_of_the_flash_head(vocab_size, cluster_size):
    case = Case(vocab_size, cluster_size, bias=True)
    head = FlashHead(
        case.rows, case.token_ids, case.centroids, n_probes=1, backend="mlx", max_positions=1000
    )
    hidden = mx.array(case.states)
    for n_probes in probe_counts(case.n_clusters):
        head.n_probes = n_probes
        logits = np.array(head(hidden), dtype=np.float64)
        got, _ = case.measure(case.routing(), n_probes)
        winners = case.logits.argmax(axis=1)
        assert got.agreement == (logits.argmax(axis=1) == winners).mean()
        assert got.agreement == (np.array(head.token(hidden)) == winners).mean()
        assert got.kl == pytest.approx(kl(case.logits, logits), rel=1e-3, abs=1e-5)
        assert got.perplexity == pytest.approx(perplexity(logits, case.next_ids), rel=1e-4)
        ids, _ = head.candidates(hidden)
        covered = (np.array(ids) == case.next_ids[:, None]).any(axis=1)
        assert got.coverage == pytest.approx(covered.mean())


def test_all_clusters_are_the_dense_head():
    case = Case(37, 8)
    got, dense = case.measure(case.routing(drawn=True), case.n_clusters)
    assert (got.agreement, got.coverage) == (1, 1)
    assert got.covered_mass == pytest.approx(1)
    assert got.kl == pytest.approx(0, abs=1e-12)
    assert got.perplexity == pytest.approx(dense)
    assert got.drawn_perplexity == pytest.approx(dense)


@pytest.mark.parametrize("n_probes", [3, 20])
def test_drawn_perplexity_is_that_of_simulated_draws(n_probes):
    """Simulated by drawing the clusters one by one, each in proportion to exp(score)."""
    case = Case(60, 2, n_states=40, scale=0.3)
    got, _ = case.measure(case.routing(drawn=True), n_probes)
    rng = np.random.default_rng(5)
    weights = np.exp(case.scores_of(case.states).astype(np.float64))
    dense = np.exp(case.logits)
    likelihood = np.zeros(len(case.states))
    n_draws = 400
    for i in range(len(case.states)):
        for _ in range(n_draws):
            chosen = rng.choice(
                case.n_clusters, n_probes, replace=False, p=weights[i] / weights[i].sum()
            )
            probed = np.isin(case.cluster_of, chosen)
            if probed[case.next_ids[i]]:
                total = dense[i, probed].sum()
                likelihood[i] += dense[i, case.next_ids[i]] / total / n_draws
    simulated = np.exp(-np.log(likelihood).mean())
    assert got.drawn_perplexity == pytest.approx(simulated, rel=0.1)


@pytest.mark.filterwarnings("error")
def test_draws_of_zero_are_usual_ones(monkeypatch):
    """One of 2²³ is zero: of a large vocabulary's clusters, some are in every evaluation."""

    class Generator:
        def standard_exponential(self, shape, dtype):
            return np.zeros(shape, dtype)

    case = Case()
    monkeypatch.setattr(np.random, "default_rng", lambda _: Generator())
    got, _ = case.measure(case.routing(drawn=True), 3)
    assert np.isfinite(got.drawn_perplexity)


def test_one_drawn_probe_has_a_known_distribution():
    """softmax of the scores, times softmax within the cluster; also for tokens rarely drawn."""
    case = Case()
    got, _ = case.measure(case.routing(drawn=True), 1, next_ids=case.next_ids[::-1])
    log_cluster = log_softmax(case.scores_of(case.states).astype(np.float64))
    same = case.cluster_of == case.cluster_of[case.next_ids[::-1], None]
    within = log_softmax(np.where(same, case.logits, -np.inf))
    rows = np.arange(len(case.states))
    own = case.next_ids[::-1]
    expected = np.exp(-(log_cluster[rows, case.cluster_of[own]] + within[rows, own]).mean())
    assert expected > 50 * case.n_clusters
    assert got.drawn_perplexity == pytest.approx(expected, rel=0.1)


def test_clusters_that_are_always_probed_are_always_drawn():
    case = Case()
    always = np.zeros(case.n_clusters, np.float32)
    always[:3] = 1e30
    routing = Routing("own", lambda h: case.scores_of(h) + always, case.tail_offset, drawn=True)
    case.next_ids = np.full(len(case.states), case.token_ids[2, 0])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        got, _ = case.measure(routing, 3)
        case.next_ids = np.full(len(case.states), case.token_ids[5, 0])
        hopeless, _ = case.measure(routing, 3)
        possible, _ = case.measure(routing, 4)
    within = np.where(case.cluster_of < 3, case.logits, -np.inf)
    expected = perplexity(within, np.full(len(case.states), case.token_ids[2, 0]))
    assert got.drawn_perplexity == pytest.approx(expected, rel=1e-5)
    assert hopeless.drawn_perplexity == pytest.approx(1e12)
    assert possible.drawn_perplexity < 1e9


def test_draws_depend_on_the_seed_only():
    case = Case()
    figures = [
        case.measure(case.routing(drawn=True), 5, seed=seed)[0].drawn_perplexity
        for seed in (0, 0, 1)
    ]
    assert figures[0] == figures[1] != figures[2]


def test_equal_scores_go_to_the_first_clusters():
    case = Case(64, 8)
    flat = Routing("flat", lambda h: np.zeros((len(h), 8), np.float32), None)
    got, _ = case.measure(flat, 3)
    first = np.isin(case.logits.argmax(axis=1), case.token_ids[:3]).mean()
    assert got.agreement == pytest.approx(first)


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
    got, dense = case.measure(case.routing(), 3)
    assert np.isfinite([got.kl, got.perplexity, got.covered_mass, dense]).all()
    whole, _ = case.measure(case.routing(), 8)
    assert whole.kl == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_measured_is_nan_and_none_in_json():
    case = Case()
    got, dense = case.measure(Routing("bare", case.scores_of, None), 5, next_ids=None)
    assert np.isnan([got.coverage, got.kl, got.perplexity, got.drawn_perplexity, dense]).all()
    assert 0 < got.agreement < 1
    as_dict = got.to_dict()
    assert as_dict["coverage"] is as_dict["kl"] is as_dict["perplexity"] is None
    assert json.loads(json.dumps(as_dict, allow_nan=False)) == as_dict
    got, dense = case.measure(Routing("bare", case.scores_of, None), 5)
    assert np.isnan([got.kl, got.perplexity]).all()
    assert got.coverage > 0
    assert dense > 1


def test_routings_and_probe_counts_in_order():
    case = Case()
    routings = [Routing(name, case.scores_of, case.tail_offset) for name in ("a", "b")]
    results, _ = measure(
        case.states, case.logits_of, case.token_ids, routings, [2, 9], progress=False
    )
    assert [(m.routing, m.n_probes) for m in results] == [("a", 2), ("a", 9), ("b", 2), ("b", 9)]
    assert results[0].agreement == results[2].agreement < results[1].agreement
    assert all(isinstance(m, Measures) for m in results)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(capsys, progress):
    case = Case()
    measure(case.states, case.logits_of, case.token_ids, [case.routing()], [2], progress=progress)
    assert ("Measuring: 100%" in capsys.readouterr().err) == progress


def test_large_vocabularies_are_measured_in_smaller_chunks(monkeypatch):
    case = Case()
    expected = case.measure(case.routing(), 3)
    sizes = []

    def logits_of(states):
        sizes.append(len(states))
        return np.array(case.rows.matmul(mx.array(states)))

    monkeypatch.setattr(measures, "CHUNK_LOGITS", 4 * case.token_ids.size - 1)
    monkeypatch.setattr(case, "logits_of", logits_of)
    found = case.measure(case.routing(), 3)
    assert set(sizes) == {3}
    assert found[0].to_dict() == pytest.approx(expected[0].to_dict(), nan_ok=True)
    assert found[1] == pytest.approx(expected[1])
