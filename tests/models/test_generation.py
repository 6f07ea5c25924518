"""The package's generation: mlx-lm's functions under settings that last as long as the call."""

import importlib
from itertools import zip_longest

import mlx_lm
import pytest
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_flashhead import batch_generate, generate, load, stream_generate
from mlx_flashhead.models.locate import find_head
from model_pair import N_PROBES, uncached
from refusals import refused
from tiny_adapters import write_adapters

PROMPTS = ("One day", "How do I bake bread?", "x")
BATCH = (*PROMPTS, "Why is the sky blue", "It was", "The river")
TOKENS = 12


@pytest.fixture
def flash(pair):
    """``(model, tokenizer)``, whose FlashHead each test must leave as it was."""
    yield pair.model, pair.tokenizer
    assert state(pair.head) == (N_PROBES, None, None)


def state(head):
    return head.n_probes, head._settings.draw_temperature, head.projection


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_mlx_lms_of_the_dense_model(flash, pair, prompt):
    dense = pair.dense, pair.tokenizer
    expected = mlx_lm.generate(*dense, prompt, max_tokens=TOKENS)
    for options in ({}, {"n_probes": 1}, {"dense": True}):
        assert generate(*flash, prompt, max_tokens=TOKENS, **options) == expected
    for options in ({}, {"dense": True}):
        assert generate(*dense, prompt, max_tokens=TOKENS, **options) == expected
    for options in ({"n_probes": 1}, {"draw_temperature": 1.0}):
        refused(lambda options=options: generate(*dense, prompt, **options), "has no FlashHead")


@pytest.mark.parametrize(
    "shared_pair, size", [("tied", 7), ("untied", 1), ("untied", 100)], indirect=["shared_pair"]
)
def test_without_verification_the_flash_head_chooses(flash, pair, size):
    ids = pair.encode("How do I bake bread for two people")
    options = {"prefill_step_size": size}
    assert pair.tokens(pair.model, ids, **options) == pair.expected(ids)
    usual = pair.tokens(pair.model, ids, verify=False, **options)
    assert usual == pair.unverified(ids) != pair.expected(ids)
    pair.head.n_probes = 1
    expected = pair.until_end(pair.unverified(ids))
    pair.head.n_probes = N_PROBES
    found = pair.until_end(pair.tokens(pair.model, ids, n_probes=1, verify=False, **options))
    assert found == expected != usual


def test_mlx_lms_keywords_arrive(flash, capsys):
    options = {
        "logits_processors": make_logits_processors(logit_bias={7: 1e6}),
        "sampler": make_sampler(temp=0.8, top_k=5),
        "max_tokens": 3,
    }
    assert [r.token for r in stream_generate(*flash, "One day", **options)] == [7, 7, 7]
    text = generate(*flash, "One day", max_tokens=3, verbose=True)
    printed = capsys.readouterr().out
    assert text in printed
    assert "tokens-per-sec" in printed


def test_settings_end_with_an_error_and_with_an_abandoned_stream(flash, pair):
    def failing(logprobs):
        raise RuntimeError("in the sampler")

    drawn = {"n_probes": 2, "draw_temperature": 1.0}
    for function, prompt in ((generate, "One day"), (batch_generate, [[5]])):
        with pytest.raises(RuntimeError, match="in the sampler"):
            function(*flash, prompt, sampler=failing, **drawn)
    with pytest.raises(TypeError):
        generate(*flash, "One day", dense=True, no_such_keyword=1)
    for options in ({}, drawn):
        stream = stream_generate(*flash, "One day", max_tokens=50, **options)
        next(stream)
        assert state(pair.head) == (N_PROBES, None, None)
        stream.close()


def test_streams_take_turns(flash):
    """Each has its own settings, whichever starts or ends first."""
    settings = [
        {"max_tokens": 9, "n_probes": 1, "verify": False},
        {"max_tokens": 5, "dense": True},
        {"max_tokens": 12},
        {"max_tokens": 9, "verify": False},
    ]
    expected = [generate(*flash, "One day", **options) for options in settings]
    assert len(set(expected)) == 4
    streams = [stream_generate(*flash, "One day", **options) for options in settings]
    texts = [""] * 4
    for responses in zip_longest(*streams):
        for i, response in enumerate(responses):
            # A text that has ended has no more responses.
            if response is not None:
                texts[i] += response.text
    assert texts == expected


# A loop sees no difference between tied and untied embeddings.
@pytest.mark.parametrize("shared_pair", ["untied"], indirect=True)
@pytest.mark.parametrize("sizes", [{}, {"completion_batch_size": 2, "prefill_batch_size": 2}])
@pytest.mark.parametrize("settings", [{}, {"dense": True}, {"verify": False}], ids=str)
def test_batch_is_what_each_gets_alone(flash, pair, sizes, settings):
    prompts = [pair.encode(prompt) for prompt in BATCH]
    if settings == {"verify": False}:
        alone = pair.unverified
    else:
        alone = pair.expected
    options = {"max_tokens": TOKENS, "return_token_ids": True, **sizes, **settings}
    found = batch_generate(*flash, prompts, **options).token_ids
    assert found == [pair.until_end(alone(ids, TOKENS)) for ids in prompts]


def test_batch_of_several_turns(flash, pair):
    prompts = [pair.encode(prompt) for prompt in BATCH]
    more = pair.encode(" and then?")
    options = {"max_tokens": 6, "return_token_ids": True}
    first = batch_generate(*flash, prompts, return_prompt_caches=True, **options)
    turns = [more] * len(prompts)
    second = batch_generate(*flash, turns, prompt_caches=first.caches, **options)
    whole = [answer for answer in first.token_ids if len(answer) == 6]
    assert len(whole) > 3
    for prompt, answer, found in zip(prompts, first.token_ids, second.token_ids, strict=True):
        # The end of one that ended is in the cache too.
        if answer in whole:
            assert found == pair.until_end(pair.expected(prompt + answer + more, 6))
    refused(lambda: batch_generate(*flash, [[5], []]), "Text 1 has an empty prompt: give it at")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_the_body_work_and_those_of_the_head_are_refused(pair, tmp_path, kind):
    adapters = str(write_adapters(tmp_path / "adapters", pair.dense_folder, kind=kind))
    dense, _ = mlx_lm.load(str(pair.dense_folder), adapter_path=adapters)
    model, _ = load(str(pair.folder), adapter_path=adapters)
    ids = pair.encode(PROMPTS[1])
    assert pair.tokens(model, ids) == uncached(dense, ids) != pair.expected(ids)
    path = find_head(pair.dense).path
    adapters = str(write_adapters(tmp_path / "head", pair.dense_folder, kind=kind, keys=(path,)))
    said = f"{path!r} carries a LoRA adapter.* must be fused first"
    refused(lambda: load(str(pair.folder), adapter_path=adapters), said)


def test_a_replaced_function_of_mlx_lm_is_called(pair, monkeypatch):
    """The text is mlx-lm's own then, since its loop would look the function up."""
    module = importlib.import_module("mlx_lm.generate")
    calls = []
    make = module.make_prompt_cache

    def replaced(*arguments, **options):
        calls.append(arguments)
        return [RotatingKVCache(max_size=8) for _ in make(*arguments, **options)]

    monkeypatch.setattr(module, "make_prompt_cache", replaced)
    expected = mlx_lm.generate(pair.dense, pair.tokenizer, PROMPTS[0], max_tokens=12)
    assert generate(pair.model, pair.tokenizer, PROMPTS[0], max_tokens=12) == expected
    assert len(calls) == 2
