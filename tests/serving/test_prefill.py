"""Prompts: read a chunk at a time, as far as no cache holds them already."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

import mlx_flashhead
from engines import CHUNK, LONG, SHORT, generated, submit, tokens_of, until
from mlx_flashhead.models.compat.mlx_lm import KVCache
from mlx_flashhead.serving.jobs import Progress, Token
from mlx_flashhead.serving.prefill import (
    CHUNK_SECONDS,
    SMALLEST_CHUNK,
    PrefillPace,
    PromptCaches,
)
from model_folders import write_model


def test_progress_is_told_until_the_prompt_is_read(start, chunks):
    one, told = submit(start(), LONG), []
    while isinstance(event := until(one, Progress | Token), Progress):
        told.append(event)
    assert told == [Progress(done, 400) for done in (*range(CHUNK, 399, CHUNK), 399)]


def test_prompts_that_begin_alike_share_what_is_read(start, flash, chunks):
    engine = start()
    whole = [*LONG, *tokens_of(submit(engine, LONG))]
    other = [*LONG[:200], *SHORT]
    del chunks[:]
    one = submit(engine, other)
    assert tokens_of(one) == generated(flash, other)
    assert one.cached == 200
    assert sum(size for _, size in chunks) == 2
    for prompt in (whole, LONG):  # all that is held, and its beginning
        same = submit(engine, prompt)
        assert tokens_of(same) == generated(flash, prompt)
        assert same.cached == len(prompt) - 1


def test_caches_are_bounded(start):
    engine = start("--prompt-cache-bytes", "1K")
    tokens_of(submit(engine, LONG))
    again = submit(engine, LONG[:100])
    tokens_of(again)
    assert again.cached == 0


def test_room_is_made_for_caches_in_use():
    def filled():
        cache = KVCache()
        cache.update_and_fetch(*[mx.zeros((1, 1, 256, 1))] * 2)
        return [cache]

    served = SimpleNamespace(name="a model")
    caches = PromptCaches(8, max_bytes=3 * filled()[0].nbytes)
    for number in range(4):
        caches.store(served, [number, *range(255)], filled(), in_use=[1] * (number == 3))
    assert sum(bool(caches.find(served, [number, 0, 7])[1]) for number in range(4)) == 2
    assert caches.find(SimpleNamespace(name="another"), [3, 0, 7]) == (None, 0)


@pytest.mark.parametrize("drafts", [False, True])
def test_landmarks_are_found_again_where_a_cache_cannot_be_cut(
    tmp_path, start_engine, caplog, drafts
):
    settings = {"head_dim": 32, "query_pre_attn_scalar": 32}
    settings |= {"sliding_window": 32, "sliding_window_pattern": 2}
    dense = write_model(tmp_path / "dense", arch="gemma3_text", hidden_size=64, further=settings)
    folder, options = str(tmp_path / "flash"), {"calibration": "none", "progress": False}
    mlx_flashhead.convert(str(dense), folder, n_probes=4, **options)
    loaded = mlx_flashhead.load(folder)
    first, second = [*LONG[:80], 50, 51], [*LONG[:80], 60, 61, 62]
    with start_engine(folder=folder, drafts=drafts) as engine:
        assert not engine.models.result()[0].cuttable
        for prompt, landmarks, cached in (
            (first, (80, 81), 0),
            (second, (80, 82), 80),
            (first, (80, 81), 81),
            (first[:81], (), 80),  # its last token is read again
        ):
            one = submit(engine, prompt, landmarks=landmarks)
            assert tokens_of(one) == generated(loaded, prompt)
            assert one.cached == cached
    assert "Traceback" not in caplog.text


def test_pace_finds_what_fits_into_a_chunks_time():
    pace = PrefillPace(2048)

    def took(seconds):
        for _ in range(20):
            pace.took(pace.n_tokens, seconds(pace.n_tokens))
        return pace.n_tokens

    for speed in (10_000, 1000):  # tokens a second, which are fewer far into a prompt
        assert CHUNK_SECONDS / 4 <= took(lambda n: n / speed) / speed <= CHUNK_SECONDS  # noqa: B023
    assert took(lambda n: 100.0) == SMALLEST_CHUNK
    assert took(lambda n: 0.0) == 2048
    assert PrefillPace(8).n_tokens == 8
