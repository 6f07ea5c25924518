"""Prompts: read a chunk at a time, as far as no cache holds them already."""

import pytest

import mlx_flashhead
from engines import CHUNK, LONG, SHORT, generated, running, submit, tokens_of
from mlx_flashhead.serving.engine.job import Progress, Token
from mlx_flashhead.serving.engine.prefill import CHUNK_SECONDS, SMALLEST_CHUNK, Pace
from model_folders import write_model
from served_models import served_model


def test_progress_is_told_until_the_prompt_is_read(start, chunks):
    one = submit(start(), LONG)
    told = []
    while True:
        _, event = one.events.get(timeout=30)
        if isinstance(event, Token):
            break
        told.append(event)
    assert len(told) == -(-399 // CHUNK)
    assert told[0] == Progress(CHUNK, 400)
    assert told[-1] == Progress(399, 400)


def test_prompts_that_begin_alike_share_what_is_read(start, flash, chunks):
    engine = start()
    tokens_of(submit(engine, LONG))
    other = [*LONG[:200], *SHORT]
    del chunks[:]
    one = submit(engine, other)
    assert tokens_of(one) == generated(flash, other)
    assert one.cached == 200
    assert sum(size for _, size in chunks) == 2
    same = submit(engine, LONG)
    assert tokens_of(same) == generated(flash, LONG)
    assert same.cached == 399


def test_caches_are_bounded(start):
    engine = start("--prompt-cache-bytes", "1K")
    tokens_of(submit(engine, LONG))
    again = submit(engine, LONG[:100])
    tokens_of(again)
    assert again.cached == 0


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A converted folder of a model with a sliding window of 32 tokens."""
    folder = tmp_path_factory.mktemp("sliding")
    further = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
    further |= {"sliding_window_pattern": 2}
    write_model(folder / "dense", arch="gemma3_text", hidden_size=64, further=further)
    new = folder / "flash"
    mlx_flashhead.convert(
        str(folder / "dense"), str(new), calibration="none", progress=False, n_probes=4
    )
    return new


def test_landmarks_are_found_again_where_a_cache_cannot_be_cut(sliding, chunks):
    engine = running(lambda: [served_model(sliding)])
    loaded = mlx_flashhead.load(str(sliding))
    try:
        assert not engine.models.result()[0].cuttable
        first, second = [*LONG[:80], 50, 51], [*LONG[:80], 60, 61, 62]
        assert tokens_of(submit(engine, first, landmarks=(80, 81))) == generated(loaded, first)
        one = submit(engine, second, landmarks=(80, 82))
        assert tokens_of(one) == generated(loaded, second)
        assert one.cached == 80
        same = submit(engine, first, landmarks=(80, 81))
        assert tokens_of(same) == generated(loaded, first)
        assert same.cached == 81
    finally:
        assert engine.close(20)


def test_pace_finds_what_fits_into_a_chunks_time():
    pace = Pace(2048)
    for _ in range(20):
        pace.took(pace.n_tokens, pace.n_tokens / 10_000)  # 10,000 tokens a second
    assert CHUNK_SECONDS / 4 <= pace.n_tokens / 10_000 <= CHUNK_SECONDS
    for _ in range(20):
        pace.took(pace.n_tokens, pace.n_tokens / 1000)  # ten times as slow, far into a prompt
    assert CHUNK_SECONDS / 4 <= pace.n_tokens / 1000 <= CHUNK_SECONDS
    for _ in range(20):
        pace.took(pace.n_tokens, 100.0)
    assert pace.n_tokens == SMALLEST_CHUNK
    for _ in range(20):
        pace.took(pace.n_tokens, 0.0)
    assert pace.n_tokens == 2048
    assert Pace(8).n_tokens == 8
