"""Greedy decoding by the head's token: the text of full logits, without them."""

from itertools import zip_longest

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from kernel_cases import kernels
from mlx_flashhead import generate, get_flash_head, make_sampler, stream_generate
from mlx_flashhead.head.greedy import GreedyTokens
from mlx_flashhead.loading.attach import install_index
from mlx_flashhead.models.dense import load_dense
from mlx_flashhead.models.greedy import decodes_greedily
from mlx_flashhead.models.install import detach
from model_folders import write_model
from tiny_models import tiny_index

TOKENS = 24
PROMPTS = ["One day", "The", "Water boils at"]


@pytest.fixture(scope="module", params=["tied", "untied"])
def flash(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    write_model(folder, tied=request.param == "tied", hidden_size=128, seed=4)
    model, tokenizer, _ = load_dense(folder)
    install_index(model, tiny_index(model, n_probes=4, eos_token_ids=(1,)))
    return model, tokenizer


@pytest.fixture
def calls(flash, monkeypatch):
    """What the head was asked for: "token" or "logits", in turn."""
    head, found = get_flash_head(flash[0]), []
    for name in ("token", "expand"):
        step = getattr(head._steps, name)
        monkeypatch.setattr(
            head._steps, name, lambda *a, step=step, name=name: (found.append(name), step(*a))[1]
        )
    return found


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("n_probes", [1, 4])
def test_the_text_is_that_of_full_logits(flash, calls, prompt, n_probes):
    head = get_flash_head(flash[0])
    with head.settings(n_probes=n_probes):
        expected = mlx_lm.generate(*flash, prompt, max_tokens=TOKENS)
        full = [r.token for r in mlx_lm.stream_generate(*flash, prompt, max_tokens=TOKENS)]
    assert set(calls) == {"expand"}
    calls.clear()
    assert generate(*flash, prompt, n_probes=n_probes, max_tokens=TOKENS) == expected
    options = {"n_probes": n_probes, "max_tokens": TOKENS, "logprobs": False}
    found = [r.token for r in stream_generate(*flash, prompt, **options)]
    assert found == full and set(calls) == {"token"}


def test_samplers_that_are_greedy(flash, calls):
    expected = generate(*flash, "One day", max_tokens=9)
    for sampler in (mlx_lm_sampler(temp=0), make_sampler(temp=0, model=flash[0])):
        assert generate(*flash, "One day", max_tokens=9, sampler=sampler) == expected
    assert set(calls) == {"token"}


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": mlx_lm_sampler(temp=0.8)},
        {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)},  # who knows what it reads
        {"logits_processors": [lambda tokens, logits: logits]},
        {"draw_temperature": 1.0, "sampler": mlx_lm_sampler(temp=1.0)},
    ],
)
def test_what_needs_full_logits_gets_them(flash, calls, options):
    generate(*flash, "One day", max_tokens=4, **options)
    assert "expand" in calls and "token" not in calls


def test_responses_have_log_probabilities_unless_they_are_not_used(flash):
    (first, *_) = stream_generate(*flash, "One day", max_tokens=2)
    vocab_size = get_flash_head(flash[0]).vocab_size
    assert first.logprobs.shape == (vocab_size,)
    (other, *_) = stream_generate(*flash, "One day", max_tokens=2, logprobs=False)
    assert other.token == first.token and other.logprobs.shape == (1,)


def test_streams_take_turns(flash):
    """One with full logits and one without, and the head is left as it was."""
    head = get_flash_head(flash[0])
    options = ({"logprobs": False, "n_probes": 1}, {"n_probes": 4}, {"logprobs": False})
    expected = [
        [r.token for r in stream_generate(*flash, "The", max_tokens=8, **one)] for one in options
    ]
    streams = [stream_generate(*flash, "The", max_tokens=8, **one) for one in options]
    found: list[list[int]] = [[], [], []]
    for turn in zip_longest(*streams):
        for tokens, response in zip(found, turn, strict=True):
            tokens += [] if response is None else [response.token]
    assert found == expected
    assert head._greedy is None


def test_a_draft_model_and_a_dense_model_decode_as_ever(flash):
    model, _ = flash
    settings = {"dense": False, "draw_temperature": None}
    assert decodes_greedily(model, settings, {})
    assert not decodes_greedily(model, settings, {"draft_model": model})
    assert not decodes_greedily(model, settings | {"dense": True}, {})


def test_a_softcap_needs_full_logits(flash, monkeypatch):
    """Two logits may be one after it, and then the lower id wins."""
    model, _ = flash
    assert decodes_greedily(model, {"dense": False, "draw_temperature": None}, {})
    monkeypatch.setattr(
        "mlx_flashhead.models.greedy.finish_of", lambda model: lambda logits: mx.tanh(logits)
    )
    assert not decodes_greedily(model, {"dense": False, "draw_temperature": None}, {})


def test_tokens_of_several_positions(flash):
    head = get_flash_head(flash[0])
    hidden = mx.random.normal((2, 3, head.hidden_size), key=mx.random.key(0))
    tokens = GreedyTokens()
    with pytest.raises(RuntimeError, match="no token yet"):
        tokens.sampler(mx.zeros((1, 1)))
    with head.settings(greedy=tokens):
        logits = head(hidden)
    assert logits.shape == (2, 3, 1)
    expected = np.array(mx.argmax(head(hidden), axis=-1))
    np.testing.assert_array_equal(np.array(tokens.latest), expected)
    np.testing.assert_array_equal(np.array(tokens.sampler(logits[:, -1])), expected[:, -1])


def test_on_the_kernels(flash):
    """Four of them for each token, and none that writes full logits."""
    model, tokenizer = flash
    expected = generate(model, tokenizer, "One day", max_tokens=6)
    detach(model)
    index = tiny_index(model, n_probes=4, eos_token_ids=(1,))
    try:
        with kernels() as emulator:
            install_index(model, index, backend="metal")
            before = [] if emulator is None else list(emulator.dispatches)
            assert generate(model, tokenizer, "One day", max_tokens=6) == expected
            detach(model)
    finally:
        install_index(model, index)
    if emulator is not None:
        names = [d.name.removeprefix("flash_head_") for d in emulator.dispatches[len(before) :]]
        assert names and names == ["route", "select", "score", "token"] * (len(names) // 4)
