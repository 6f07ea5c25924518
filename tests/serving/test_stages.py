"""Sequences: prompts are read a chunk at a time, as far as no cache holds them already, and each
is generated as if it were alone, in a batch or by itself."""

import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest

import mlx_flashhead
from engines import (
    CHUNK,
    LONG,
    SHORT,
    checked,
    convert,
    endless,
    flags,
    generated,
    submit,
    tokens_of,
    until,
)
from mlx_flashhead import grammar_processor
from mlx_flashhead.decoding.phase import MAY_DIFFER
from mlx_flashhead.decoding.policy import Tuning, policy_of
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.loading.builds import POLL_SECONDS, build_beside
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.models.compat.mlx_lm import LRUPromptCache, make_prompt_cache
from mlx_flashhead.serving import engine as serving_engine
from mlx_flashhead.serving.answer_text import PromptProgress, Token
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.jobs import Job
from mlx_flashhead.serving.prompts import Prompt
from mlx_flashhead.serving.served_models import ServedModel
from mlx_flashhead.serving.stages import (
    CHUNK_SECONDS,
    SMALLEST_CHUNK,
    Reading,
    Single,
    next_chunk,
)
from model_folders import write_model


@pytest.fixture(params=["engine", "drafting"])
def either(request):
    """An engine that decodes batches, or one sequence after another with drafts."""
    return request.getfixturevalue(request.param)


def test_answers_are_what_the_package_generates(either, flash):
    """In batches of one setting, several settings at once."""
    prompts = [SHORT, LONG, LONG[:100], [50]]
    settings = [{}, {"n_probes": 1}, {"dense": True}]
    jobs = [[submit(either, prompt, **setting) for setting in settings] for prompt in prompts]
    for of_prompt, prompt in zip(jobs, prompts, strict=True):
        expected = generated(flash, prompt)
        assert [tokens_of(one) for one in of_prompt] == [expected] * len(settings)


def test_seeds_repeat_whatever_else_is_drawn(engine):
    options = {"temperature": 1.5, "seed": -7, "max_tokens": 12}
    alone = tokens_of(submit(engine, SHORT, **options))
    others = [submit(engine, SHORT, temperature=1.5, max_tokens=12) for _ in range(3)]
    others.append(submit(engine, SHORT, **options | {"seed": 8}))
    assert tokens_of(submit(engine, SHORT, **options)) == alone
    assert len({tuple(alone), *(tuple(tokens_of(other)) for other in others)}) == 5


def test_processors_see_the_whole_sequence(either):
    seen = []

    def look(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    whole = [*LONG, *tokens_of(submit(either, LONG, 6, processors=[look]))]
    assert seen[0] == LONG and all(tokens[: len(LONG)] == LONG for tokens in seen)
    assert any(tokens == whole[: len(tokens)] and len(tokens) > 402 for tokens in seen)


def test_texts_of_a_form_are_the_dense_models(either, flash):
    """A grammar follows what is drafted, and goes back. Each of a batch has its own."""

    def texts(**settings):
        rules = [grammar_processor(flash[1], regex=regex) for regex in ("[0-9]{5}", "(ab|cd){4}")]
        jobs = [submit(either, SHORT, 20, processors=[rule], **settings) for rule in rules]
        return [flash[1].decode(tokens_of(one)) for one in jobs]

    first, second = texts(n_probes=1)
    assert first.isdecimal() and len(first) == 5 and set(second) <= set("abcd") and len(second) == 8
    assert texts(dense=True) == [first, second]


def test_a_cache_with_drafts_is_cut_where_it_ends(drafting, flash):
    """What follows an answer, or a cancelled one, is answered as without a cache."""
    tokens = tokens_of(submit(drafting, LONG[:60], 10))
    cancelled = endless(drafting, LONG[:70])
    for _ in range(4):
        until(cancelled, Token)
    cancelled.ended = True
    after = ([*LONG[:60], *tokens, 60, 61], 60), ([*LONG[:70], 50, 50, 61], 70)
    for longer, n_cached in after:
        one = submit(drafting, longer)
        assert tokens_of(one) == generated(flash, longer)
        assert one.cached >= n_cached


def test_quantized_caches(start, flash):
    engine = start("--kv-bits", 8, "--kv-group-size", 32, "--quantized-kv-start", 20)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    options |= {"prefill_step_size": CHUNK}
    for prompt in (LONG, SHORT):
        assert tokens_of(submit(engine, prompt)) == generated(flash, prompt, **options)
    again = submit(engine, LONG)
    assert len(tokens_of(again)) == 8 and again.cached == 399


@pytest.mark.parametrize("n_steps", [0, 1, 4])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_single_text_whose_client_leaves_is_stored_as_long_as_it_is(tiny, bits, n_steps):
    """Also before its first step: then the cache lacks the prompt's last token."""
    arguments = ["--prefill-step-size", CHUNK]
    tolerance = 1e-4
    if bits is not None:
        arguments += ["--kv-bits", bits, "--kv-group-size", 32]
        tolerance = 0.1
    options = flags(*arguments)
    prompt = LONG[:30]
    request = checked(tiny, {"prompt": "x"}, chat=False)
    reading = Reading(Job(request, Prompt(list(prompt))), LRUPromptCache(), options)
    while reading.left:
        reading.read(CHUNK)
    single = Single(reading, options, mx.default_stream(mx.default_device()))
    tokens = [token for _ in range(n_steps) for _, token, _ in single.step()]
    [(held, cache)] = single.remove(single.jobs)
    if n_steps == 0:
        assert held == prompt[:-1]
    else:
        assert held == [*prompt, *tokens]
    assert {layer.offset for layer in cache} == {len(held)}
    expected = make_prompt_cache(tiny.model)
    for start in range(0, len(held), CHUNK):
        tiny.model(mx.array([held[start : start + CHUNK]]), cache=expected)
    next_token = mx.array([[7]])
    found, alike = (tiny.model(next_token, cache=each) for each in (cache, expected))
    assert mx.allclose(found, alike, atol=tolerance)


@pytest.mark.parametrize("first", [16, 40, 128])
def test_quantized_caches_do_not_depend_on_how_a_prompt_is_cut(start, flash, first):
    """The size of a chunk follows its time, and so what other clients do."""
    settings = {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 0}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    flags = [str(part).replace("_", "-") for part in flags]
    engine = start(*flags, "--prefill-step-size", 128)
    expected = generated(flash, LONG, **settings, prefill_step_size=128)
    engine._chunk = first
    # The second one's prompt is in the cache.
    for _ in range(2):
        assert tokens_of(submit(engine, LONG)) == expected


def test_kept_prompts_take_a_quarter_of_the_memory(start, monkeypatch):
    for memory, held in ((1 << 30, len(LONG) - 1), (4096, 0)):
        monkeypatch.setattr(serving_engine, "memory_bytes", lambda memory=memory: memory)
        engine = start()
        tokens_of(submit(engine, LONG))
        same = submit(engine, LONG)
        tokens_of(same)
        assert same.cached == held


def test_prompts_that_begin_alike_share_what_is_read_and_progress_is_reported(start, flash, chunks):
    engine = start()
    one = submit(engine, LONG)
    events = []
    event = until(one, PromptProgress | Token)
    while isinstance(event, PromptProgress):
        events.append(event)
        event = until(one, PromptProgress | Token)
    assert events == [PromptProgress(done, 400) for done in (*range(CHUNK, 399, CHUNK), 399)]
    tokens_of(one)
    whole = [*LONG, *one.tokens]
    other = [*LONG[:200], *SHORT]
    del chunks[:]
    one = submit(engine, other)
    assert tokens_of(one) == generated(flash, other)
    assert one.cached == 200
    assert sum(size for _, size in chunks) == 2
    # All that is held is found again, and so is its beginning.
    for prompt in (whole, LONG):
        same = submit(engine, prompt)
        assert tokens_of(same) == generated(flash, prompt)
        assert same.cached == len(prompt) - 1
    bounded = start("--prompt-cache-bytes", "1K")
    for _ in range(2):
        one = submit(bounded, LONG)
        tokens_of(one)
        assert one.cached == 0


@pytest.mark.parametrize("drafts", [False, True])
def test_landmarks_are_found_again_where_a_cache_cannot_be_cut(
    tmp_path, start_engine, caplog, drafts
):
    settings = {"head_dim": 32, "query_pre_attn_scalar": 32}
    settings |= {"sliding_window": 32, "sliding_window_pattern": 2}
    dense = write_model(tmp_path / "dense", arch="gemma3_text", hidden_size=64, further=settings)
    folder = convert(dense, "flash", n_probes=4)
    loaded = mlx_flashhead.load(str(folder))
    first = [*LONG[:80], 50, 51]
    second = [*LONG[:80], 60, 61, 62]
    with start_engine(folder=folder, drafts=drafts) as engine:
        assert not engine.models.result()[0].cuttable
        for prompt, landmarks, cached in (
            (first, (80, 81), 0),
            (second, (80, 82), 80),
            (first, (80, 81), 81),
            # Its last token is read again.
            (first[:81], (), 80),
        ):
            one = submit(engine, prompt, landmarks=landmarks)
            assert tokens_of(one) == generated(loaded, prompt)
            assert one.cached == cached
    assert "Traceback" not in caplog.text


def test_chunks_are_what_fits_into_their_time():
    def chunk_at(speed, chunk=32):
        for _ in range(20):
            chunk = next_chunk(chunk, chunk, chunk / speed, 2048)
        return chunk

    # Speeds are tokens a second.
    for speed in (10_000, 1000):
        assert CHUNK_SECONDS / 4 <= chunk_at(speed) / speed <= CHUNK_SECONDS
    assert (chunk_at(1), chunk_at(10**9)) == (SMALLEST_CHUNK, 2048)
    # The rest of a prompt, which is smaller than a chunk, says nothing.
    assert next_chunk(32, 5, 0.0, 2048) == 32


def test_answers_before_at_and_after_the_swap_are_the_dense_models(dense, quick):
    """The generating thread builds a FlashHead beside its answers."""
    model, tokenizer = mlx_lm.load(str(dense))
    expected = generated((model, tokenizer), SHORT, 30)
    options = HeadOptions(progress=False)
    served = ServedModel(("tiny",), model, tokenizer, None, 512)
    served.build = build_beside(model, tokenizer, Path("tiny"), options)
    engine = Engine(lambda: [served], flags())
    seen = {engine.models.result(60)[0].decoding()}
    while served.build is not None:
        jobs = [submit(engine, SHORT, 30) for _ in range(3)]
        assert [tokens_of(job) for job in jobs] == [expected] * 3
        seen.add(served.decoding())
        # The build goes on while nobody waits.
        time.sleep(4 * POLL_SECONDS)
    assert "dense: its FlashHead is being built" in seen and served.decoding() == "verified"
    assert tokens_of(submit(engine, SHORT, 30)) == expected
    assert engine.close(60)


@pytest.mark.parametrize("stays_dense", [False, True])
def test_the_log_says_what_was_measured_at_the_end_of_a_build(
    tiny, monkeypatch, caplog, stays_dense
):
    """A model that stays dense is not said to be served with its FlashHead before that."""
    policy = policy_of(tiny.head)
    tuning = Tuning(gain=1.5, sampled_gain=1.5, dense_seconds=0.1)
    for name, value in (("tuning", tuning), ("dense", stays_dense)):
        monkeypatch.setattr(policy, name, value)
    build = SimpleNamespace(has_ended=False, take_over=lambda model: None)
    engine = Engine.__new__(Engine)
    engine._waiting = []
    engine._stages = []
    served = SimpleNamespace(name="tiny", model=tiny.model, head=tiny.head, build=build)
    engine._building = [served]
    with caplog.at_level("INFO"):
        engine._take_built()
        assert caplog.text == ""
        build.has_ended = True
        engine._take_built()
    said = "tiny is served with its FlashHead (speed: 1.50 x)"
    assert (said in caplog.text) == (not stays_dense) and engine._building == []


def test_what_is_said_is_what_decodes(tiny, monkeypatch):
    for owner, name, value, said in (
        (policy_of(tiny.head), "dense", True, "verified"),
        (tiny, "settings", DecodingSettings(verify=False), "unverified"),
        (tiny, "settings", DecodingSettings(max_wait=0), "dense: --max-wait is 0"),
        (tiny, "text_may_differ", True, MAY_DIFFER.words),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert tiny.decoding(n_probes=2) == said
            assert tiny.decoding(dense=True) == "dense: as requested"
            if name == "dense":
                assert tiny.decoding() == "dense: FlashHead is no faster on this machine"
    monkeypatch.setattr(tiny, "settings", DecodingSettings(dense=True))
    assert tiny.decoding() == "dense: as requested"
