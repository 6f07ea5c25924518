"""A head's settings: always scored tokens, drawn probes, dense blocks, probes, backends."""

from itertools import permutations

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.head.backend import BACKEND_VARIABLE, choose_backend
from mlx_flashhead.head.chosen_operations import make_operations
from mlx_flashhead.head.clustered import Centroids
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.operations import PortableOperations
from mlx_flashhead.head.unverified import NEVER_DRAWN
from retrieval import best_token, candidates
from tiny_models import fitted, random_clusters, random_rows

VOCAB_SIZE = 203
HIDDEN_SIZE = 64
CLUSTER_SIZE = 8
N_CLUSTERS = 26


def make_head(*, n_probes=4, **kwargs):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, VOCAB_SIZE, HIDDEN_SIZE)
    token_ids = random_clusters(rng, VOCAB_SIZE, CLUSTER_SIZE)
    centroids = fitted(rows, token_ids)
    head = FlashHead(rows, token_ids, centroids, n_probes=n_probes, backend="mlx", **kwargs)
    return head, rows, mx.array(rng.normal(size=(3, 5, HIDDEN_SIZE)).astype(np.float32))


def head_of_scores(scores, **kwargs):
    """A head whose stage 1 gives ``scores`` (C,), whatever the state; two tokens a cluster."""
    n_clusters = len(scores)
    rows = Matrix(mx.random.normal((2 * n_clusters, 32), key=mx.random.key(0)))
    bias = mx.array(scores, dtype=mx.float32)
    centroids = Centroids(Matrix(mx.zeros((n_clusters, 32))), bias, mx.zeros((n_clusters,)))
    token_ids = np.arange(2 * n_clusters).reshape(n_clusters, 2)
    return FlashHead(rows, token_ids, centroids, backend="mlx", **kwargs)


def scored(head, hidden) -> list[set[int]]:
    """The tokens that are scored for each state."""
    ids, _ = candidates(head, hidden)
    return [set(row) - {head.vocab_size} for row in np.array(ids).reshape(-1, ids.shape[-1])]


def clusters_of(tokens) -> frozenset[int]:
    """The clusters of a head of scores that hold the tokens."""
    return frozenset(token // 2 for token in tokens)


def test_eos_is_always_scored():
    scores = [5.0, 4, 3, 2, -1e6, 1]
    state = mx.ones((1, 32))
    head = head_of_scores(scores, n_probes=2, eos_token_ids=(9, 8, -1, 500))
    assert scored(head, mx.zeros((3, 32))) == [{0, 1, 8, 9}] * 3
    logits = head.unverified_logits(state)
    dense = head.dense_logits(state)
    assert mx.array_equal(logits[:, 8:10], dense[:, 8:10])
    few = head_of_scores(scores, n_probes=1, eos_token_ids=(4, 9))
    assert scored(few, mx.zeros((1, 32)))[0] in ({4, 5}, {8, 9})
    assert np.isfinite(np.array(few.unverified_logits(state))).all()


@pytest.mark.parametrize("n_probes, temperature", [(1, 0.5), (2, 2.0), (3, 1.0)])
def test_drawn_probes_have_the_papers_distribution(n_probes, temperature):
    scores = np.array([1.0, 0.5, 0.0, -0.5, 2.0])
    share = np.exp(scores / temperature)
    expected: dict[frozenset, float] = {}
    for order in permutations(range(5), n_probes):
        probability = 1.0
        left = share.sum()
        for cluster in order:
            probability *= share[cluster] / left
            left -= share[cluster]
        expected[frozenset(order)] = expected.get(frozenset(order), 0) + probability
    n_draws = 4000
    head = head_of_scores(scores, n_probes=n_probes)
    mx.random.seed(0)
    with head.settings(draw_temperature=temperature):
        draws = scored(head, mx.zeros((n_draws, 32)))
    found = [clusters_of(draw) for draw in draws]
    assert set(found) <= set(expected)
    for chosen, probability in expected.items():
        deviation = 5 * np.sqrt(probability * (1 - probability) / n_draws)
        assert found.count(chosen) / n_draws == pytest.approx(probability, abs=deviation + 1e-4)


def test_only_drawn_tokens_can_be_sampled():
    head, rows, hidden = make_head(n_probes=3, eos_token_ids=(17,))
    hidden = mx.tile(hidden[0, :1], (2000, 1))
    temperature = 3.0
    mx.random.seed(1)
    with head.settings(draw_temperature=temperature):
        logits = head(hidden)
    values = np.array(logits)
    dense = np.array(rows.matmul(hidden))
    assert np.isfinite(values).all()
    can_be_drawn = values > NEVER_DRAWN / 2
    # Some slots are padded.
    assert (np.abs(can_be_drawn.sum(axis=1) - 3 * CLUSTER_SIZE) <= 3).all()
    assert np.allclose(values[can_be_drawn], dense[can_be_drawn], atol=1e-4)
    tokens = np.array(mx.random.categorical(logits / temperature))
    assert can_be_drawn[np.arange(2000), tokens].all()
    assert len({row.tobytes() for row in can_be_drawn}) > 1


def test_a_plain_call_is_dense_and_a_block_is_not():
    head, rows, hidden = make_head(eos_token_ids=(3,))
    expected = head.dense_logits(hidden)
    estimates = head.unverified_logits(hidden)
    assert mx.allclose(expected, rows.matmul(hidden), rtol=0, atol=1e-4)
    assert not mx.allclose(expected, estimates, rtol=0, atol=1e-2)
    with pytest.raises(RuntimeError), head.settings() as same:
        assert same is head and mx.array_equal(head(hidden), estimates)
        with head.settings(dense=True):
            assert mx.array_equal(head(hidden), expected)
        assert mx.array_equal(head(hidden), estimates)
        raise RuntimeError
    assert mx.array_equal(head(hidden), expected)
    with head.intercepted(lambda states: states * 2):
        assert mx.array_equal(head(hidden), hidden * 2)
    assert mx.array_equal(head(hidden), expected)


def test_settings_are_those_of_the_innermost_block():

    def state():
        return head.unverified_probes, head._settings.draw_temperature

    head, _, _ = make_head()
    with head.settings(n_probes=2, draw_temperature=0.5):
        assert state() == (2, 0.5)
        with head.settings(n_probes=3, draw_temperature=2):
            assert state() == (3, 2.0)
        for said, wrong in (
            ("n_probes is 0", {"n_probes": 0, "draw_temperature": 1.0}),
            ("leave n_probes out", {"n_probes": 3, "dense": True}),
            *(("of the draw.*above 0", {"draw_temperature": t}) for t in (0, -1.0, float("nan"))),
        ):
            with pytest.raises(ValueError, match=said):
                head.settings(**wrong).__enter__()
            assert state() == (2, 0.5)
    assert state() == (4, None)


def test_proposals_have_a_number_of_probes_of_their_own():
    head, _, hidden = make_head(n_probes=2, unverified_probes=4)
    assert head.propose(hidden[:, 0], None).probes.shape[-1] == 2
    assert candidates(head, hidden)[0].shape[-1] == 4 * CLUSTER_SIZE
    with pytest.raises(ValueError, match="choose 1 to 26"):
        head.unverified_probes = 27
    head.n_probes = 4
    assert mx.array_equal(head.propose(hidden[:, 0], None).tokens, best_token(head, hidden[:, 0]))


@pytest.mark.parametrize("n_probes", [0, N_CLUSTERS + 1, True, 2.0])
def test_n_probes_that_are_not(n_probes):
    head, _, _ = make_head()
    said = rf"{n_probes}, but .* 26 clusters: choose 1 to 26\.$"
    if type(n_probes) is not int:
        said = "n_probes must be a whole number, not"
    with pytest.raises(ValueError, match=said):
        head.n_probes = n_probes
    assert head.n_probes == 4
    with pytest.raises(ValueError, match=said):
        make_head(n_probes=n_probes)


def test_backend_is_chosen(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    assert choose_backend() == choose_backend("mlx") == "mlx"
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert choose_backend("metal") == "metal"
    assert choose_backend() == "mlx"
    operations, reason = make_operations(make_head()[0].clustered, None)
    assert type(operations) is PortableOperations and reason == "MLX's default device is the CPU."
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert choose_backend() == "metal"
    monkeypatch.setenv(BACKEND_VARIABLE, "mlx")
    assert choose_backend() == "mlx" and choose_backend("metal") == "metal"
    for variable, argument in (("mlx", "cuda"), ("cuda", None)):
        monkeypatch.setenv(BACKEND_VARIABLE, variable)
        with pytest.raises(ValueError, match=r"Unknown .* backend 'cuda': choose metal or mlx"):
            choose_backend(argument)
