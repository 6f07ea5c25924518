"""Texts that are generated together: each has the tokens that it has alone."""

import threading

import mlx.core as mx
import pytest
from mlx_lm import sample_utils
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from flash_loops import OTHERS, PROMPT, make_flash
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding import batch
from mlx_flashhead.decoding.batch import VerifiedBatchGenerator
from mlx_flashhead.decoding.caches import BatchCaches
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.models.compat.mlx_lm import StopSequences
from recorded_calls import recorded_calls

PROMPTS = [PROMPT, *OTHERS]
SETTINGS = [
    {},
    {"temp": 1.0, "seed": 1},
    {"temp": 0.8, "top_p": 0.9, "seed": 2},
    {"temp": 1.2, "xtc_probability": 0.5, "xtc_threshold": 0.05, "seed": 3},
]


def sampled(settings):
    return {"samplers": [make_sampler(**each) for each in settings]}


def alone(flash, prompt, settings, processors):
    options = {"sampler": make_sampler(**settings), "logits_processors": processors}
    return flash.tokens(prompt=prompt, max_tokens=25, dense=True, **options)


@pytest.mark.parametrize("with_processors", [False, True])
def test_mixed_settings_share_the_steps(flash, misses, with_processors):
    processors = [[], [], [], []]
    if with_processors:
        processors[1] = sample_utils.make_logits_processors(repetition_penalty=1.3)
    tokens, ends = flash.batch(PROMPTS, logits_processors=processors, **sampled(SETTINGS))
    expected = [alone(flash, *each) for each in zip(PROMPTS, SETTINGS, processors, strict=True)]
    assert tokens == expected
    # The clusters of a penalty's tokens are scored, too: here all.
    assert misses or with_processors
    for prompt, found, end in zip(PROMPTS, tokens, ends, strict=True):
        assert end.finish_reason == "length" and end.all_tokens == prompt + found
        assert [layer.offset for layer in end.prompt_cache] == [len(prompt) + 25] * 2


def test_rows_that_all_are_proposed_by_the_head(flash, misses, monkeypatch):
    monkeypatch.setattr(type(flash.head.operations), "expand", None)
    settings = [SETTINGS[i] for i in (0, 1, 2, 0)]
    tokens, _ = flash.batch(PROMPTS, **sampled(settings))
    assert tokens == [alone(flash, p, s, []) for p, s in zip(PROMPTS, settings, strict=True)]


def test_samplers_of_all_rows_draw_at_once(flash, monkeypatch):
    """A CPU starts the next step beside the last operations of one: four draws hide nothing."""
    calls = recorded_calls(monkeypatch, Draws, "choose")
    settings = [SETTINGS[i] for i in (1, 2, 2, 1)]
    tokens, _ = flash.batch(PROMPTS, dense=True, **sampled(settings))
    assert {len(logits) for _, logits in calls} == {4}
    assert tokens == [alone(flash, p, s, []) for p, s in zip(PROMPTS, settings, strict=True)]


def test_sequences_that_end_together_leave_in_one_step(flash, monkeypatch):
    """The caches of all layers are copied to drop a sequence."""
    calls = recorded_calls(monkeypatch, BatchCaches, "keep")
    flash.batch(PROMPTS, dense=True)
    assert [rows for _, rows in calls] == [[]]


def rotating():
    return [RotatingKVCache(max_size=12) for _ in range(2)]


OPTIONS = {
    "another's sampler": lambda: {"samplers": [sample_utils.make_sampler(temp=1.0)] * 4},
    "rotating caches": lambda: {"caches": [rotating() for _ in PROMPTS]},
    "16 bits": lambda: sampled(SETTINGS[i] for i in (0, 1, 2, 0)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_is_as_a_dense_one(flash, misses, name):
    if name == "16 bits":
        flash = make_flash(dtype=mx.bfloat16, bits=4)
    found = [flash.batch(PROMPTS, dense=dense, **OPTIONS[name]())[0] for dense in (False, True)]
    assert found[0] == found[1]
    # Several texts that draw from MLX's random state are dense.
    assert misses or name == "another's sampler"


@pytest.fixture(scope="module")
def greedy(flash):
    return [alone(flash, prompt, {}, []) for prompt in PROMPTS]


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 8, 11])
def test_a_text_that_is_taken_away_leaves_nothing_behind(flash, greedy, n_steps):
    """As when a client hangs up, between any proposal and its check."""
    generator = VerifiedBatchGenerator(flash.model, logprobs=False)
    uids = generator.insert(PROMPTS, [25] * 4)
    tokens = {uid: [] for uid in uids}
    for step in range(120):
        if step == n_steps:
            cache, held = generator.remove(uids[1:2], return_prompt_caches=True)[uids[1]]
            assert held == PROMPTS[1] + tokens[uids[1]] or not tokens[uids[1]]
            if tokens[uids[1]]:
                assert [layer.offset for layer in cache] == [len(held)] * 2
        for response in generator.next()[1]:
            tokens[response.uid].append(response.token)
    for i in (0, 2, 3):
        assert tokens[uids[i]] == greedy[i]
    assert tokens[uids[1]] == greedy[1][: len(tokens[uids[1]])]


def test_a_text_that_joins_later(flash, greedy):
    generator = VerifiedBatchGenerator(flash.model, logprobs=False)
    tokens = {}
    generator.insert([PROMPT], [25])
    for step in range(120):
        if step == 5:
            cache = make_prompt_cache(flash.model)
            prompt = OTHERS[0]
            flash.model(mx.array([prompt[:-1]]), cache=cache)
            generator.insert([prompt[-1:]], [25], caches=[cache], all_tokens=[prompt[:-1]])
        for response in generator.next()[1]:
            tokens.setdefault(response.uid, []).append(response.token)
    assert [tokens[uid] for uid in sorted(tokens)] == greedy[:2]


@pytest.mark.parametrize("cache", [lambda: None, rotating])
def test_a_stop_token_ends_a_text(flash, cache):
    """In each form that mlx-lm takes. Its cache holds its tokens, also where later tokens were
    confirmed with it."""
    ((expected,), _) = flash.batch([PROMPT], caches=[cache()], dense=True)
    for stop, form in zip(expected[5:12:3], (int, list, tuple), strict=True):
        if form is int:
            stops = {stop}
        else:
            stops = [form([stop])]
        generator = VerifiedBatchGenerator(flash.model, stop_tokens=stops)
        generator.insert([PROMPT], [25], caches=[cache()])
        responses = [r for each in iter(generator.next_generated, []) for r in each]
        n = expected.index(stop) + 1
        assert [response.token for response in responses] == expected[:n]
        assert responses[-1].finish_reason == "stop"
        assert [layer.offset for layer in responses[-1].prompt_cache] == [len(PROMPT) + n] * 2


# mlx-lm 0.31 has state machines.
@pytest.mark.newest
def test_each_text_has_stops_of_its_own(flash, greedy):
    stops = [StopSequences([[tokens[8]], tokens[3:5]]) for tokens in greedy]
    tokens, ends = flash.batch(PROMPTS, stop_sequences=stops)
    for found, whole, end in zip(tokens, greedy, ends, strict=True):
        n = min(whole.index(whole[8]) + 1, 5)
        assert found == whole[:n] and end.finish_reason == "stop"


def test_arrays_made_at_import_are_evaluated_in_any_thread():
    """A lazy array could not be evaluated but in the thread that imported the module."""
    read = []
    thread = threading.Thread(target=lambda: read.append(batch.NO_LOGPROBS.tolist()))
    thread.start()
    thread.join()
    assert read == [[0.0]]
