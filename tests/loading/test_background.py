"""A FlashHead that is built beside the use of its model."""

import threading
import time
from pathlib import Path

import mlx_lm
import pytest

from mlx_flashhead import get_flash_head, stream_generate
from mlx_flashhead.decoding.policy import Tuning, policy_of
from mlx_flashhead.loading import background, tuned
from mlx_flashhead.loading import sources as cache
from mlx_flashhead.loading.background import (
    BackgroundBuild,
    IdleBuild,
    background_build,
    build_now,
)
from mlx_flashhead.loading.head_options import HeadOptions
from model_folders import write_model

OPTIONS = HeadOptions(progress=False, tunes=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("background") / "model")


@pytest.fixture
def loaded(folder, quick):
    return mlx_lm.load(str(folder))


def build_of(model, tokenizer, kind=BackgroundBuild):
    return background_build(model, tokenizer, Path("model"), OPTIONS, kind)


def tokens(model, tokenizer, prompt="One day", n=8):
    stream = stream_generate(model, tokenizer, prompt, max_tokens=n)
    return [response.token for response in stream]


def test_text_before_between_and_after_is_the_dense_models(loaded):
    model, tokenizer = loaded
    dense = tokens(model, tokenizer)
    build = build_of(model, tokenizer)
    n_steps = 1
    while build.advance():
        n_steps += 1
        if n_steps % 7 == 0:
            assert tokens(model, tokenizer) == dense
    assert n_steps > 10
    assert get_flash_head(model) is not None
    assert tokens(model, tokenizer, n=20)[:8] == dense
    assert len(cache.entries()) == 1 and build_of(model, tokenizer) is None


@pytest.mark.parametrize("tunes", [True, False])
def test_what_takes_seconds_is_announced(loaded, monkeypatch, tunes):
    def tune(*_):
        yield
        return Tuning(gain=1.5, sampled_gain=1.5, dense_seconds=0.01)

    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    options = HeadOptions(progress=False, tunes=tunes)
    said = []
    object.__setattr__(options, "say", said.append)
    build_now(*loaded, Path("model"), options)
    building, *measuring, ready = said
    assert "Building the FlashHead" in building and "FlashHead is ready" in ready
    assert [sentence[:9] for sentence in measuring] == ["Measuring", "FlashHead"] * tunes
    assert not tunes or "makes this model 1.50 times as fast here" in measuring[1]


@pytest.mark.parametrize("seconds, size", [(299, 16), (301, 32)])
def test_a_build_that_would_take_long_is_a_shorter_one(loaded, monkeypatch, seconds, size):
    monkeypatch.setattr(background, "expected_seconds", lambda rows, options: seconds)
    build_now(*loaded, Path("model"), OPTIONS)
    head = get_flash_head(loaded[0])
    assert head.clustered.cluster_size == size


def test_a_dropped_build_leaves_nothing(loaded, flash_head_home):
    for n_steps in (0, 1, 5, 20):
        build = build_of(*loaded)
        for _ in range(n_steps):
            build.advance()
        build.drop()
        assert not build.advance() and get_flash_head(loaded[0]) is None
        assert not cache.entries()
    build_now(*loaded, Path("model"), OPTIONS)  # nothing is locked any more
    assert get_flash_head(loaded[0]) is not None


@pytest.mark.parametrize("dies", [False, True])
def test_another_process_builds(loaded, dies):
    """The second one takes what the first has built, or builds itself where that one has died: the
    lock of a file knows no process."""
    model, tokenizer = loaded
    other, _ = mlx_lm.load(str(tokenizer.name_or_path))
    first = build_of(model, tokenizer)
    second = build_of(other, tokenizer)
    assert first.advance()
    assert all(second.advance() for _ in range(5)) and get_flash_head(other) is None
    if dies:
        first.drop()
    while not dies and first.advance():
        pass
    steps = sum(1 for _ in iter(second.advance, False))
    assert get_flash_head(other) is not None
    assert (steps > 10) == dies and len(cache.entries()) == 1


def test_a_thread_builds_while_nothing_is_written(loaded):
    model, tokenizer = loaded
    dense = tokens(model, tokenizer)
    idle = build_of(model, tokenizer, IdleBuild)
    seen = []
    while idle.is_building and len(seen) < 1000:
        with idle.paused(model):
            seen.append(tokens(model, tokenizer))
        time.sleep(0.01)
    assert get_flash_head(model) is not None
    assert all(found == dense for found in seen)
    assert tokens(model, tokenizer) == dense
    assert "build" not in [thread.name for thread in threading.enumerate()]


def test_a_thread_that_is_closed_leaves_a_dense_model(loaded):
    idle = build_of(*loaded, IdleBuild)
    idle.close()
    idle._thread.join()
    assert not idle.is_building
    with idle.paused(loaded[0]):
        assert get_flash_head(loaded[0]) is None


def test_what_was_measured_on_the_copy_counts_for_the_model(loaded, monkeypatch):
    model, tokenizer = loaded

    def tune(*_):
        yield
        return Tuning(gain=0.9, sampled_gain=0.8, dense_seconds=0.1)

    monkeypatch.setattr(tuned, "tune", tune)
    monkeypatch.delenv("MLX_FLASHHEAD_TUNING")
    options = HeadOptions(progress=False)
    idle = background_build(model, tokenizer, Path("model"), options, IdleBuild)
    idle._thread.join()
    monkeypatch.setattr(tuned, "tune", lambda *_: pytest.fail("measured again"))
    with idle.paused(model):
        assert policy_of(get_flash_head(model)).dense
