"""Samplers and processors of others: called once a token, in order, unless known or marked."""

from functools import partial
from itertools import count
from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

import old_top_p
from flash_loops import N_TOKENS, PROMPT, make_flash
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding.text import Text
from mlx_flashhead.head.draws.summed_top_p import SummedTopP
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.models.compat import mlx_lm
from mlx_flashhead.models.compat.mlx_lm import PROCESSORS_SEE_PROMPT, generate_step
from recorded_calls import recorded_calls

FORMATS = {"float32": {}, "bfloat16": {"dtype": mx.bfloat16}, "4 bits": {"bits": 4}}


@pytest.fixture(scope="module", params=FORMATS)
def model(request):
    return make_flash(num_hidden_layers=2, **FORMATS[request.param])


def numpy_sampler():
    rng = np.random.default_rng(3)

    def sample(logprobs):
        p = np.exp(np.array(logprobs.astype(mx.float32), dtype=np.float64))[0]
        return mx.array([rng.choice(len(p), p=p / p.sum())], dtype=mx.uint32)

    return sample


def cooling():
    heat = count(5)
    return lambda logprobs: mx.random.categorical(logprobs * 0.1 * next(heat))


class Guide:
    """The control flow of outlines' guides: a state that each token moves on."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, logits):
        self.calls.append(tokens.tolist())
        allowed = sum(ids[-1] for ids in self.calls) % 5
        return mx.where(mx.arange(logits.shape[-1]) % 5 == allowed, logits, -mx.inf)


def mlx_lms_tokens(flash, **options):
    """The tokens of mlx-lm's own loop, with the normal head."""
    mx.random.seed(7)
    prompt = mx.array(PROMPT, dtype=mx.uint32)
    return [int(t) for t, _ in generate_step(prompt, flash.model, max_tokens=N_TOKENS, **options)]


@pytest.mark.parametrize("make", [numpy_sampler, cooling])
def test_another_sampler_is_called_once_a_token(model, make):
    """Called twice, where draws that agree are taken, it would sample colder."""

    def run(tokens):
        sampler = Mock(spec=[], side_effect=make())
        return tokens(sampler=sampler), sampler.call_count

    assert run(model.tokens) == run(partial(mlx_lms_tokens, model))


@pytest.mark.parametrize("sampler", [None, make_sampler(temp=0.9, seed=2)], ids=["best", "draws"])
def test_another_processor_is_called_once_a_token(model, sampler):
    def run(tokens):
        processor = Guide()
        return tokens(sampler=sampler, logits_processors=[processor]), processor.calls

    found = run(model.tokens)
    assert found == run(partial(model.tokens, dense=True))
    # The processors of mlx-lm 0.31 see the last token of a prompt alone.
    n_seen = len(PROMPT) if PROCESSORS_SEE_PROMPT else 1
    assert len(found[1][0]) == n_seen
    if sampler is None:
        assert found == run(partial(mlx_lms_tokens, model))


MLX_LM = {
    "greedy": {},
    "temperature": {"temp": 1.0},
    "min-p": {"temp": 1.1, "min_p": 0.05},
    "top-p": {"temp": 0.8, "top_p": 0.9},
    "top-k": {"temp": 1.5, "top_k": 6},
    "all": {"temp": 1.2, "top_p": 0.95, "min_p": 0.01, "top_k": 30},
}


@pytest.mark.parametrize(
    "name, penalty", [*((name, None) for name in MLX_LM), ("greedy", 1.4), ("all", 1.4)]
)
def test_samplers_of_mlx_lm_are_verified(model, name, penalty, misses):
    """Two texts after one another, as the second draws from where the first has left the state."""
    sampler = sample_utils.make_sampler(**MLX_LM[name])
    processors = sample_utils.make_logits_processors(repetition_penalty=penalty)
    assert is_recognised(sampler, processors)
    options = {"sampler": sampler, "logits_processors": processors, "max_tokens": 13}

    def run(dense):
        mx.random.seed(5)
        texts = []
        for _ in range(2):
            texts.append([token for token, _ in model.steps(dense=dense, **options)])
        return texts, mx.random.state[0].tolist()

    assert run(False) == run(True)
    # With a penalty its tokens' clusters are scored, too: here nearly all.
    assert misses or penalty


# The settings of their default requests.
HOSTS = {
    "vllm-mlx": {"temp": 0.7, "top_p": 0.9},
    "mlx-openai-server": {"temp": 0.7, "top_p": 0.95, "top_k": 20},
    "oMLX": {"temp": 0.7, "top_p": 0.95},
    "oMLX, thinking": {"temp": 0.6, "top_p": 0.95, "top_k": 20},
    "all": {"temp": 1.2, "top_p": 0.95, "min_p": 0.01, "top_k": 30},
}


@pytest.mark.parametrize("name", HOSTS)
def test_the_top_p_of_mlx_lm_0_31_is_verified(model, name, misses, monkeypatch):
    """Its samplers are recognised by their module's text: here they are the text of a helper."""
    monkeypatch.setattr(mlx_lm, "is_omlx_sampler", lambda _: True)
    sampler = old_top_p.make_sampler(**HOSTS[name])
    assert isinstance(Text(sampler).settings, SummedTopP)
    proposed = recorded_calls(monkeypatch, FlashHead, "propose")
    for seed in range(3):

        def run(tokens, seed=seed):
            mx.random.seed(seed)
            found = [int(t) for t, _ in tokens(sampler=sampler, max_tokens=N_TOKENS)]
            return found, mx.random.state[0].tolist()

        plain = partial(generate_step, mx.array(PROMPT, dtype=mx.uint32), model.model)
        assert run(model.steps) == run(plain)
    assert len(proposed) >= 2 * N_TOKENS and misses


def is_recognised(sampler, processors=()):
    return Text(sampler, processors).is_known


def test_what_is_recognised():
    unknown = lambda tokens, logits: logits  # noqa: E731
    assert is_recognised(None)
    assert is_recognised(make_sampler(temp=1.0, top_p=0.9))
    assert is_recognised(None, sample_utils.make_logits_processors({1: 5.0}, 1.2, 20, 0.5))
    assert not is_recognised(None, [unknown])
    assert not is_recognised(unknown)
    for chain in ({"xtc_probability": 0.5}, {"min_p": 0.1, "min_tokens_to_keep": 3}):
        for make in (make_sampler, sample_utils.make_sampler):
            assert not is_recognised(make(temp=1.0, **chain))


# mlx-lm 0.31 raises an error.
@pytest.mark.newest
def test_a_least_number_of_tokens_is_min_p_s():
    logits = mx.log(mx.array([[0.7, 0.2, 0.06, 0.04]]))
    sampler = make_sampler(temp=1.0, top_p=0.5, min_p=0.5, min_tokens_to_keep=3)
    assert {sampler.choose(logits, 1, i).item() for i in range(200)} == {0}
