"""Samplers on candidates: mlx-lm's distribution, or mlx-lm's sampler itself."""

import inspect
from types import MappingProxyType

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

import mlx_flashhead
from mlx_flashhead import get_flash_head, make_sampler
from mlx_flashhead.head.centroids import Centroids
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.models.install import install
from mlx_flashhead.models.sampling import MIN_CLUSTERS
from tiny_models import random_clusters, tiny_index, tiny_model

VOCAB_SIZE, HIDDEN_SIZE, CLUSTER_SIZE = 17_003, 8, 16
N_CLUSTERS = -(-VOCAB_SIZE // CLUSTER_SIZE)  # some slots are padded

TRUNCATING = {
    "top-p": {"top_p": 0.9},
    "top-p that keeps one token": {"top_p": 0.001},
    "min-p": {"min_p": 0.05},
    "min-p that keeps 9": {"min_p": 0.9, "min_tokens_to_keep": 9},
    "top-k": {"top_k": 7},
    "all": {"top_p": 0.95, "min_p": 0.001, "top_k": 40},
    "top-p, XTC": {
        "top_p": 0.9, "xtc_probability": 1.0, "xtc_threshold": 0.02, "xtc_special_tokens": [5, 6],
    },
    "min-p, XTC": {"min_p": 0.02, "xtc_probability": 1.0, "xtc_threshold": 0.02},
    "XTC, top-k": {
        "top_k": 30, "xtc_probability": 1.0, "xtc_threshold": 0.02, "xtc_special_tokens": [5],
    },
}  # fmt: skip
WHOLE = {
    "greedy": {"temp": 0.0, "top_p": 0.9, "top_k": 3},
    "temperature": {"temp": 0.7},
    "top-p of 1": {"temp": 1.0, "top_p": 1.0},
    "XTC": {"temp": 1.0, "xtc_probability": 0.5, "xtc_special_tokens": [1]},
    "top-k above the clusters": {"temp": 1.0, "top_k": MIN_CLUSTERS + 1},
    "min-p that keeps more than the clusters": {
        "temp": 1.0, "min_p": 0.9, "min_tokens_to_keep": MIN_CLUSTERS + 1,
    },
}  # fmt: skip


def make_head(vocab_size=VOCAB_SIZE, **kwargs) -> FlashHead:
    rng = np.random.default_rng(0)
    rows = Matrix(mx.array(rng.normal(size=(vocab_size, HIDDEN_SIZE)).astype(np.float32)))
    token_ids = random_clusters(rng, vocab_size, CLUSTER_SIZE)
    n_clusters = len(token_ids)
    centroids = mx.array(rng.normal(size=(n_clusters, HIDDEN_SIZE)).astype(np.float32))
    centroids = Centroids(Matrix(centroids), mx.zeros(n_clusters), mx.zeros(n_clusters))
    return FlashHead(rows, token_ids, centroids, **{"n_probes": 4, "backend": "mlx"} | kwargs)


@pytest.fixture(scope="module")
def head() -> FlashHead:
    return make_head()


def logprobs_of(steepness: float, n_rows: int = 3, dtype=mx.float32, seed: int = 0) -> mx.array:
    """(R, V) normalised. A steepness of 6 leaves few likely tokens, 0.5 thousands."""
    rng = np.random.default_rng(seed)
    logits = mx.array(rng.normal(scale=steepness, size=(n_rows, VOCAB_SIZE))).astype(dtype)
    logits[:, 5] = mx.max(logits, axis=-1) + 0.1
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Spy:
    """What samplers draw from, and whether they work on candidates."""

    def __init__(self, monkeypatch):
        self.ids = self.logits = None
        self.sorted_widths = []
        likeliest, top_p = FlashHead.likeliest, sample_utils.apply_top_p

        def spied_likeliest(head, *arguments):
            self.ids, kept = likeliest(head, *arguments)
            return self.ids, kept

        def spied_top_p(logprobs, *arguments):
            self.sorted_widths.append(logprobs.shape[-1])
            return top_p(logprobs, *arguments)

        def draw(logits, temp):
            self.logits = logits * (1.0 / temp)
            return mx.argmax(logits, axis=-1)

        monkeypatch.setattr(FlashHead, "likeliest", spied_likeliest)
        monkeypatch.setattr(sample_utils, "apply_top_p", spied_top_p)
        monkeypatch.setattr(sample_utils, "categorical_sampling", draw)

    def distribution(self, sampler, logprobs: mx.array) -> tuple[np.ndarray, np.ndarray | None]:
        """Probabilities (R, V) that ``sampler`` draws with, and its candidates' ids (R, K)."""
        self.ids = None
        sampler(logprobs)
        shares = np.array(mx.softmax(self.logits.astype(mx.float32), axis=-1), dtype=np.float64)
        if self.ids is None:
            return shares, None
        ids = np.array(self.ids)
        full = np.zeros((len(ids), VOCAB_SIZE + 1))
        np.put_along_axis(full, ids, shares, axis=-1)
        assert (full[:, VOCAB_SIZE] == 0).all(), "a padded slot can be drawn"
        return full[:, :VOCAB_SIZE], ids


@pytest.fixture
def spy(monkeypatch):
    mx.disable_compile()  # what is made while a function is compiled cannot be looked at
    yield Spy(monkeypatch)
    mx.enable_compile()


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation, of the row where it is largest."""
    return (np.abs(first - second).sum(axis=-1) / 2).max()


def test_arguments_are_mlx_lms():
    theirs = list(inspect.signature(sample_utils.make_sampler).parameters.values())
    ours = list(inspect.signature(make_sampler).parameters.values())
    known = [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == known
    assert [p.name for p in ours[len(theirs) :]] == ["model"]
    assert mlx_flashhead.make_sampler is make_sampler


@pytest.mark.parametrize("temp", [0.6, 1.7])
@pytest.mark.parametrize("name", TRUNCATING)
def test_distribution_is_mlx_lms(head, spy, name, temp):
    logprobs = logprobs_of(6.0)
    arguments = {"temp": temp} | TRUNCATING[name]
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logprobs)
    spy.sorted_widths.clear()
    found, ids = spy.distribution(make_sampler(**arguments, model=head), logprobs)
    assert ids.shape == (3, MIN_CLUSTERS * CLUSTER_SIZE)
    assert set(spy.sorted_widths) <= {MIN_CLUSTERS * CLUSTER_SIZE}
    assert ((expected > 0) == (found > 0)).all()
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["top-p", "min-p", "all", "top-p, XTC"])
def test_distribution_is_mlx_lms_in_16_bits(head, spy, name, dtype):
    """Rounded probabilities sum to something else than 1, which moves where top-p ends."""
    logprobs = logprobs_of(6.0, n_rows=8, dtype=dtype)
    assert abs(mx.exp(logprobs.astype(mx.float32)).sum(axis=-1) - 1).max() > 1e-3
    arguments = {"temp": 1.0} | TRUNCATING[name]
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logprobs)
    found, ids = spy.distribution(make_sampler(**arguments, model=head), logprobs)
    assert ids is not None
    if "top_k" in arguments:  # which of equal values are kept is anybody's choice
        expected, found = -np.sort(-expected), -np.sort(-found)
    assert distance(found, expected) < 1e-5


def test_hundreds_of_likely_tokens_keep_their_probabilities(head, spy):
    """In an open sentence a few hundred tokens are likely (Zipf), each in a cluster of its own."""
    rng = np.random.default_rng(0)
    ranks = np.stack([rng.permutation(VOCAB_SIZE) for _ in range(3)])
    logits = mx.array((-1.3 * np.log(ranks + 1.0)).astype(np.float32))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    arguments = {"temp": 1.0, "top_p": 0.9}
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logprobs)
    assert ((expected > 0).sum(axis=-1) > 300).all()
    found, ids = spy.distribution(make_sampler(**arguments, model=head), logprobs)
    assert ids is not None and distance(found, expected) < 1e-3


@pytest.mark.parametrize("arguments", [{"top_p": 0.9}, {"min_p": 0.01}, {"top_p": 0.99}])
def test_only_the_tail_is_missing(head, spy, arguments):
    """Of a flat distribution mlx-lm keeps thousands of tokens; some are no candidates."""
    logprobs = logprobs_of(0.5)
    arguments = {"temp": 1.0} | arguments
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logprobs)
    found, ids = spy.distribution(make_sampler(**arguments, model=head), logprobs)
    candidates = np.zeros((len(ids), VOCAB_SIZE + 1), dtype=bool)  # the last for padded slots
    np.put_along_axis(candidates, ids, True, axis=-1)
    candidates = candidates[:, :VOCAB_SIZE]
    missing = np.where(candidates, 0.0, expected).sum(axis=-1)
    assert missing.min() > 0.1
    assert distance(found, expected) <= missing.max() + 1e-5
    likeliest = np.argsort(-np.array(logprobs), axis=-1)[:, :MIN_CLUSTERS]
    assert np.take_along_axis(candidates, likeliest, axis=-1).all()


def test_draws_follow_the_distribution(head):
    """Chi-square of 2,560 draws on fixed seeds; 1 of 10,000 right samplers would fail it."""
    arguments = {"temp": 0.8, "top_p": 0.8, "top_k": 12}
    logprobs = logprobs_of(2.0, n_rows=1)
    kept = sample_utils.apply_top_k(sample_utils.apply_top_p(logprobs, 0.8), 12)
    expected = np.array(mx.softmax(kept[0] / 0.8))
    possible = np.flatnonzero(expected)
    assert len(possible) == 12
    sampler = make_sampler(**arguments, model=head)
    mx.random.seed(0)
    rows = mx.repeat(logprobs, 64, axis=0)
    drawn = np.concatenate([np.array(sampler(rows)) for _ in range(40)])
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)
    assert counts.sum() == counts[possible].sum() == 2560
    wanted = 2560 * expected[possible]
    assert ((counts[possible] - wanted) ** 2 / wanted).sum() < 37.4  # 11 degrees of freedom


@pytest.mark.parametrize("name", WHOLE)
def test_mlx_lms_sampler_where_nothing_is_sorted_or_too_much_kept(head, name):
    logprobs = logprobs_of(2.0)
    found, expected = (
        make_sampler(**WHOLE[name], model=head),
        sample_utils.make_sampler(**WHOLE[name]),
    )
    mx.random.seed(3)
    tokens = [found(logprobs).tolist() for _ in range(5)]
    mx.random.seed(3)
    assert tokens == [expected(logprobs).tolist() for _ in range(5)]


@pytest.mark.parametrize("name", TRUNCATING)
def test_compiled_draws_are_the_plain_ones(head, name):
    logprobs = logprobs_of(2.0)

    def tokens() -> list:
        sampler = make_sampler(temp=0.8, **TRUNCATING[name], model=head)
        mx.random.seed(7)
        return [sampler(logprobs).tolist() for _ in range(5)]

    compiled = tokens()
    mx.disable_compile()
    try:
        assert compiled == tokens()
    finally:
        mx.enable_compile()


def test_one_sampler_follows_the_heads_settings():
    """What is compiled for one number of clusters, batch or shape is not used for another."""
    head = make_head()
    sampler = make_sampler(temp=1.0, top_p=0.9, model=head)

    def drawn(logprobs) -> list:
        mx.random.seed(11)
        return sampler(logprobs).tolist()

    logprobs = logprobs_of(0.5)
    first, many = drawn(logprobs), logprobs_of(0.5, n_rows=5)
    assert len(drawn(many)) == 5 and drawn(logprobs[None]) == [first]
    head.n_probes = MIN_CLUSTERS + 8
    assert drawn(logprobs) != first  # other candidates, other draws
    head.n_probes = 4
    assert drawn(logprobs) == first


class TestMlxLmsSampler:
    """Where candidates don't apply, the draws are mlx-lm's with the same seed."""

    arguments = MappingProxyType({"temp": 1.0, "top_p": 0.9})

    def same(self, sampler, logprobs) -> bool:
        mx.random.seed(5)
        found = [sampler(logprobs).tolist() for _ in range(5)]
        mx.random.seed(5)
        whole = sample_utils.make_sampler(**self.arguments)
        return found == [whole(logprobs).tolist() for _ in range(5)]

    def test_candidates_draw_otherwise(self, head):
        assert not self.same(make_sampler(**self.arguments, model=head), logprobs_of(2.0))

    def test_without_a_model(self):
        assert self.same(make_sampler(**self.arguments), logprobs_of(2.0))

    def test_dense_model(self):
        assert self.same(make_sampler(**self.arguments, model=tiny_model()), logprobs_of(2.0))

    def test_head_that_scores_every_token(self):
        head = make_head()
        sampler = make_sampler(**self.arguments, model=head)
        with head.dense():
            assert self.same(sampler, logprobs_of(2.0))
        assert not self.same(sampler, logprobs_of(2.0))
        head.n_probes = N_CLUSTERS
        assert self.same(sampler, logprobs_of(2.0))

    def test_more_candidates_than_half_the_vocabulary(self):
        head = make_head(n_probes=N_CLUSTERS // 2)
        assert not self.same(make_sampler(**self.arguments, model=head), logprobs_of(2.0))
        head.n_probes += 1
        assert self.same(make_sampler(**self.arguments, model=head), logprobs_of(2.0))

    def test_logits_of_another_vocabulary(self, head):
        """As those of a draft model."""
        sampler = make_sampler(**self.arguments, model=head)
        logits = logprobs_of(2.0)[:, : VOCAB_SIZE - 1]
        assert self.same(sampler, logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def test_model_with_a_flash_head(spy):
    model = tiny_model(vocab_size=VOCAB_SIZE)
    index = tiny_index(model, cluster_size=CLUSTER_SIZE)
    install(model, index.token_ids, index.centroids, n_probes=4)
    logits = model(mx.array([[3]]))[:, -1]
    sampler = make_sampler(temp=1.0, top_p=0.9, model=model)
    _, ids = spy.distribution(sampler, logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert ids.shape == (1, MIN_CLUSTERS * CLUSTER_SIZE)
    assert get_flash_head(model).n_probes == 4


def test_forced_token_is_drawn_whatever_the_head_has_scored(head):
    """A logit_bias raises single tokens of clusters that nothing speaks for."""
    sampler = make_sampler(temp=1.0, top_p=0.95, top_k=20, model=head)
    logits = logprobs_of(6.0)
    for token in (0, 77, VOCAB_SIZE - 1):
        (bias,) = sample_utils.make_logits_processors(logit_bias={token: 60.0})
        biased = bias(None, logits)
        tokens = sampler(biased - mx.logsumexp(biased, axis=-1, keepdims=True))
        assert tokens.tolist() == [token] * 3


def test_bias_below_certainty(head, spy):
    """A token that is made likely, but not certain, has mlx-lm's probability."""
    logits = logprobs_of(6.0)
    logits[:, 77] = mx.max(logits, axis=-1) - 0.5
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    arguments = {"temp": 1.0, "top_p": 0.9}
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logprobs)
    found, ids = spy.distribution(make_sampler(**arguments, model=head), logprobs)
    assert ids is not None and (expected[:, 77] > 0.01).all()
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("arguments", [{"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 5}])
def test_tokens_that_are_ruled_out(head, spy, arguments):
    """A grammar leaves three tokens, all others have -inf."""
    allowed = mx.array([0, 4000, VOCAB_SIZE - 1])
    logits = mx.full((2, VOCAB_SIZE), -mx.inf)
    logits[:, allowed] = mx.array([[1.0, 0.5, 0.0], [0.0, 0.1, 3.0]])
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    arguments = {"temp": 1.0} | arguments
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logprobs)
    found, ids = spy.distribution(make_sampler(**arguments, model=head), logprobs)
    assert ids is not None and distance(found, expected) < 1e-5
    assert set(np.flatnonzero(found.sum(axis=0))) <= set(allowed.tolist())


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_shapes(head, shape):
    logprobs = logprobs_of(4.0, n_rows=int(np.prod(shape)))
    sampler = make_sampler(temp=1.0, top_k=1, model=head)
    tokens = sampler(logprobs.reshape(*shape, VOCAB_SIZE))
    assert tokens.shape == shape and tokens.dtype == mx.uint32
    assert tokens.reshape(-1).tolist() == mx.argmax(logprobs, axis=-1).tolist()


def test_seed_decides(head):
    sampler = make_sampler(temp=1.0, top_p=0.95, model=head)
    logprobs = logprobs_of(1.0, n_rows=8)

    def drawn(seed):
        mx.random.seed(seed)
        return [sampler(logprobs).tolist() for _ in range(2)]

    assert drawn(7) == drawn(7) != drawn(8)
    first, second = drawn(7)
    assert first != second


def test_nothing_is_evaluated(head):
    """A compiled function cannot evaluate; it must also find the random state's inputs."""
    sampler = make_sampler(temp=1.0, top_p=0.9, min_p=0.01, model=head)
    compiled = mx.compile(sampler, inputs=mx.random.state, outputs=mx.random.state)
    logprobs = logprobs_of(2.0)
    mx.random.seed(1)
    expected = sampler(logprobs).tolist()
    mx.random.seed(1)
    assert compiled(logprobs).tolist() == expected


def test_logits_that_are_not_normalised(head, spy):
    """They are no log-probabilities; the likeliest tokens are found all the same."""
    logits = logprobs_of(6.0) + 20.0
    arguments = {"temp": 1.0, "top_p": 0.9}
    expected, _ = spy.distribution(sample_utils.make_sampler(**arguments), logits)
    found, _ = spy.distribution(make_sampler(**arguments, model=head), logits)
    assert distance(found, expected) < 0.01


@pytest.fixture
def seeded_anew():
    """What fails while MLX compiles it leaves MLX's random state unusable."""
    yield
    mx.random.seed(0)


@pytest.mark.parametrize(
    "arguments", [{"min_p": 1.5}, {"top_k": 2.5}, {"min_p": 0.1, "min_tokens_to_keep": 0}]
)
@pytest.mark.usefixtures("seeded_anew")
def test_mistakes_are_mlx_lms(head, arguments):
    with pytest.raises(ValueError) as expected:
        sample_utils.make_sampler(temp=1.0, **arguments)(logprobs_of(1.0))
    with pytest.raises(ValueError) as found:
        make_sampler(temp=1.0, **arguments, model=head)(logprobs_of(1.0))
    assert str(found.value).split()[0] == str(expected.value).split()[0]
