"""Samplers and logits processors in mlx-lm's loops: as with the dense head, and with few probes."""

import importlib
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_logits_processors

from mlx_flashhead import get_flash_head, make_sampler
from mlx_flashhead.models.compat.generate import BatchGenerator, generate_step
from mlx_flashhead.models.install import install
from mlx_flashhead.models.sampling import MIN_CLUSTERS
from tiny_models import tiny_index, tiny_model

VOCAB_SIZE, CLUSTER_SIZE, N_PROBES = 17_001, 16, 20  # more than twice what are candidates
PROMPT = [3, 1200, 7, 7, 500]
TOKENS = 12
SAMPLERS = {
    "greedy": {},
    "temperature": {"temp": 0.8},
    "top-p": {"temp": 0.8, "top_p": 0.9},
    "min-p": {"temp": 1.2, "min_p": 0.05},
    "min-p that keeps 4": {"temp": 1.2, "min_p": 0.5, "min_tokens_to_keep": 4},
    "top-k": {"temp": 1.0, "top_k": 5},
    "XTC": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "all": {
        "temp": 0.9, "top_p": 0.95, "min_p": 0.01, "top_k": 30, "xtc_probability": 0.5,
        "xtc_threshold": 0.05, "xtc_special_tokens": [7],
    },
}  # fmt: skip
PROCESSORS = {
    "repetition": {"repetition_penalty": 1.3, "repetition_context_size": 6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "bias": {"logit_bias": {17: 3.0, 500: -2.0, 17_000: 1.0}},
    "all": {
        "repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2,
        "logit_bias": {17: 3.0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dense():
    return tiny_model(vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def installed():
    model = tiny_model(vocab_size=VOCAB_SIZE)
    index = tiny_index(model, cluster_size=CLUSTER_SIZE)
    install(model, index.token_ids, index.centroids, n_probes=N_PROBES)
    return model


@pytest.fixture
def flash(installed):
    """With few probes, whatever a test has set before."""
    get_flash_head(installed).n_probes = N_PROBES
    return installed


@pytest.fixture
def exact(flash):
    """Every cluster is probed."""
    get_flash_head(flash).n_probes = get_flash_head(flash).n_clusters
    return flash


def run(model, sampler=None, seed=0, prompt=PROMPT, max_tokens=TOKENS, **processors):
    """Tokens and log-probabilities (tokens, V) of a generation."""
    mx.random.seed(seed)
    steps = generate_step(
        mx.array(prompt),
        model,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=make_logits_processors(**processors),
    )
    tokens, logprobs = zip(*steps, strict=True)
    return list(tokens), np.array(mx.stack(logprobs))


def batch_tokens(model, prompts, samplers=None, max_tokens=TOKENS, **kwargs):
    """Tokens of each prompt, made together."""
    generator = BatchGenerator(model, **kwargs)
    uids = generator.insert(prompts, [max_tokens] * len(prompts), samplers=samplers)
    tokens = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    generator.close()
    return [tokens[uid] for uid in uids]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_with_all_probes_is_the_dense_models(dense, exact, name, seed):
    expected, theirs = run(dense, sample_utils.make_sampler(**SAMPLERS[name]), seed)
    found, ours = run(exact, make_sampler(**SAMPLERS[name], model=exact), seed)
    assert found == expected
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("sampler", ["greedy", "all"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_with_all_probes_is_the_dense_models(dense, exact, name, sampler):
    arguments = SAMPLERS[sampler]
    expected, theirs = run(dense, sample_utils.make_sampler(**arguments), **PROCESSORS[name])
    found, ours = run(exact, make_sampler(**arguments, model=exact), **PROCESSORS[name])
    assert found == expected
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    _, plain = run(dense, sample_utils.make_sampler(**arguments))
    assert np.abs(theirs - plain).max() > 0.1


@pytest.mark.parametrize("processors", [{}, PROCESSORS["all"]], ids=["", "processors"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_few_probes_draw_what_mlx_lm_would_keep(flash, monkeypatch, name, processors):
    """No token is less likely than those that mlx-lm's own chain keeps of the same logits.

    Of equally likely ones, such as the tokens of one cluster in the tail, either may be kept.
    """
    tokens, logprobs = run(flash, make_sampler(**SAMPLERS[name], model=flash), **processors)
    arguments = SAMPLERS[name] | {"xtc_probability": 0.0}
    if "xtc_probability" in SAMPLERS[name]:
        arguments["top_k"] = 0  # others move up where XTC has removed some
    kept = []
    monkeypatch.setattr(
        sample_utils, "categorical_sampling", lambda x, _: kept.append(x) or mx.argmax(x, axis=-1)
    )
    best = sample_utils.make_sampler(**arguments)(mx.array(logprobs)).tolist()
    if name == "greedy":
        assert tokens == best
        return
    assert tokens != best
    lowest = np.where(np.isfinite(np.array(kept[0])), logprobs, np.inf).min(axis=-1)
    assert (logprobs[np.arange(len(tokens)), tokens] >= lowest - 1e-5).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_logit_bias_forces_a_token_that_was_not_probed(flash, name):
    sampler = make_sampler(**SAMPLERS[name], model=flash)
    _, logprobs = run(flash, max_tokens=1)
    probed, _ = get_flash_head(flash).candidates(flash.model(mx.array([PROMPT]))[:, -1])
    logprobs[0, [token for token in probed[0].tolist() if token < VOCAB_SIZE]] = 0
    unlikely = int(logprobs[0].argmin())
    tokens, logprobs = run(flash, sampler, logit_bias={unlikely: 200.0})
    assert tokens == [unlikely] * TOKENS
    np.testing.assert_allclose(logprobs[:, unlikely], 0, atol=1e-4)


@pytest.mark.parametrize("name", ["greedy", "top-p", "top-k", "all"])
def test_logit_bias_forbids_a_token(flash, name):
    sampler = make_sampler(**SAMPLERS[name], model=flash)
    banned = {}
    for _ in range(3):
        tokens, _ = run(flash, sampler, logit_bias=banned or None)
        assert not banned.keys() & set(tokens)
        banned |= {token: -200.0 for token in tokens}
    assert len(banned) > 3


@pytest.mark.parametrize("name", ["greedy", "top-p", "all"])
@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 200.0}, {"frequency_penalty": 200.0}],
    ids=["presence", "frequency"],
)
def test_penalties_end_repetition(flash, name, penalty):
    sampler = make_sampler(**SAMPLERS[name], model=flash)
    tokens, _ = run(flash, sampler, **penalty)
    assert len({*tokens, *PROMPT}) == TOKENS + len(set(PROMPT))


def test_repetition_penalty_changes_tokens_of_the_context_alone(flash):
    _, plain = run(flash, max_tokens=1)
    _, penalised = run(flash, max_tokens=1, repetition_penalty=2.0)
    difference = penalised[0] - plain[0]
    seen = np.unique(PROMPT)
    others = np.delete(difference, seen)
    np.testing.assert_allclose(others, others[0], atol=1e-4)  # one new normaliser
    assert (difference[seen] < others[0]).all()


@pytest.mark.parametrize("n_probes", [1, N_PROBES])
def test_logprobs_are_finite_and_sum_to_one(flash, n_probes):
    get_flash_head(flash).n_probes = n_probes
    _, logprobs = run(flash, make_sampler(temp=1.0, top_p=0.9, model=flash))
    assert logprobs.shape == (TOKENS, VOCAB_SIZE) and np.isfinite(logprobs).all()
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(axis=-1), 1, atol=1e-4)


def test_top_logprobs(dense, exact):
    """As mlx-lm's server forms them: with all probes the dense model's, with few JSON all the same.

    The best token is exact in either case, up to the normaliser.
    """
    form = importlib.import_module("mlx_lm.server")._format_top_logprobs

    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [str(i) for i in ids]

    def top(model):
        _, (logprobs,) = run(model, max_tokens=1)
        found = form(mx.array(logprobs), 10, Tokenizer())
        assert json.loads(json.dumps(found, allow_nan=False)) == list(found)
        return {one["id"]: one["logprob"] for one in found}, logprobs

    expected, _ = top(dense)
    found, _ = top(exact)
    assert found == pytest.approx(expected, abs=1e-3)
    get_flash_head(exact).n_probes = N_PROBES
    few, logprobs = top(exact)
    # of equally likely ones in the tail any may be listed
    np.testing.assert_allclose(sorted(few.values()), np.sort(logprobs)[-10:], atol=1e-5)
    assert len(few) == 10 and max(few.values()) < 0


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "greedy"])
def test_seed_decides(flash, name):
    sampler = make_sampler(**SAMPLERS[name], model=flash)
    first = run(flash, sampler, seed=4)[0]
    assert run(flash, sampler, seed=4)[0] == first
    assert any(run(flash, sampler, seed=seed)[0] != first for seed in (5, 6, 7))


@pytest.mark.parametrize("shared", [True, False])
def test_batch(flash, shared):
    """Each row has its own probes; of one likeliest token each sampler must give its row's."""
    prompts = [PROMPT, [1, 2, 3], [8000, 4]]
    expected = [run(flash, prompt=prompt)[0] for prompt in prompts]
    assert len(set(map(tuple, expected))) == 3
    samplers = [make_sampler(temp=1.0, top_k=1, model=flash) for _ in prompts]
    if shared:
        assert batch_tokens(flash, prompts, sampler=samplers[0]) == expected
    else:
        assert batch_tokens(flash, prompts, samplers=samplers) == expected


def test_batch_of_two_kinds_of_samplers(flash):
    samplers = [sample_utils.make_sampler(temp=0.0), make_sampler(temp=1.0, top_k=1, model=flash)]
    expected = [run(flash, prompt=prompt)[0] for prompt in (PROMPT, [1, 2, 3])]
    assert batch_tokens(flash, [PROMPT, [1, 2, 3]], samplers=samplers) == expected


def test_draft_model_shares_the_sampler(flash):
    """It draws the draft's tokens from the draft's logits, and the model's from the model's."""
    steps = importlib.import_module("mlx_lm.generate").speculative_generate_step
    draft = tiny_model(vocab_size=VOCAB_SIZE, seed=1)
    sampler = make_sampler(temp=1.0, top_k=1, model=flash)
    found = steps(mx.array(PROMPT), flash, draft, max_tokens=TOKENS, sampler=sampler)
    assert [token for token, *_ in found] == run(flash)[0]
    # a draft of the same weights is always believed
    twin = tiny_model(vocab_size=VOCAB_SIZE)
    get_flash_head(flash).n_probes = get_flash_head(flash).n_clusters - 1
    sampler = make_sampler(temp=1.0, top_p=0.01, model=flash)
    found = [
        *steps(mx.array(PROMPT), flash, twin, max_tokens=9, num_draft_tokens=2, sampler=sampler)
    ]
    assert [drafted for *_, drafted in found] == [True, True, False] * 3


def test_candidates_are_used_here(flash):
    head = get_flash_head(flash)
    assert 2 * MIN_CLUSTERS * head.cluster_size < VOCAB_SIZE and not head.exact
