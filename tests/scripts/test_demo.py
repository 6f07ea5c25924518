"""The demo's race, on a tiny model."""

import io
import math
import re

import pytest
from rich.console import Console

import demo
from demo import Run, compare, encode, race
from mlx_flashhead import load, stream_generate
from mlx_flashhead.models.loading import load_dense


@pytest.fixture(scope="module")
def loaded(converted):
    return load(str(converted), n_probes=2)


@pytest.mark.parametrize("terminal", [True, False])
def test_shows_both_texts_their_speeds_and_that_they_are_the_same(loaded, terminal, capsys):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    compare(*loaded, "hello", max_tokens=40, rounds=1, console=console)
    output = console.file.getvalue()
    said = " ".join(output.split())
    for words in ("hello", "dense", "tokens per second", "median of 2", " x", "2 of 17 clusters"):
        assert words in said
    assert "the same, token for token" in said
    assert ("tokens/s" in output) == ("\x1b[" in output) == terminal
    assert "Warning" not in capsys.readouterr().err


def test_a_race_is_of_the_models_own_text_and_of_the_same_length(loaded, dense):
    model, tokenizer = loaded
    plain, _, _ = load_dense(dense)
    shown = []
    runs = race((plain, model), tokenizer, "hello", 20, lambda _, seconds: shown.append(seconds))
    options = {"max_tokens": 20, "sampler": demo.make_sampler(**demo.SAMPLING)}
    prompt = encode(tokenizer, "hello")
    expected = [r.token for r in stream_generate(plain, tokenizer, prompt, **options)]
    assert runs[0].token_ids == runs[1].token_ids == expected
    assert shown == [None] * len(expected) + [when for when, _ in runs[1].pieces]


def run_of(*times):
    run = Run()
    for when in times:
        run.pieces.append((when, "word "))
        run.token_ids.append(1)
    return run


def shown(runs, seconds):
    """The subtitles of both panels, after some seconds."""
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.picture_of_race(runs, seconds, 80))
    return re.findall(r"(?:done in )?[\d.]+ s, [\d.]+ tokens/s", console.file.getvalue())


def test_each_clock_stops_when_its_text_is_complete(monkeypatch):
    dense = run_of(0.0, 1.0, 2.0, 3.0, 4.0)
    flash = run_of(0.0, 0.5, 1.0, 1.5, 2.0)
    slow = "1.0 tokens/s"
    fast = "2.0 tokens/s"
    assert shown((dense, flash), None)[0] == f"4.0 s, {slow}"
    assert shown((dense, flash), 1.0) == [f"1.0 s, {slow}", f"1.0 s, {fast}"]
    assert shown((dense, flash), 3.0) == [f"3.0 s, {slow}", f"done in 2.0 s, {fast}"]
    clock = [10.0]
    seen = []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + 0.5))
    demo.let_the_slower_finish((dense, flash), lambda runs, seconds: seen.append(seconds))
    assert seen == [2.0, 2.5, 3.0, 3.5, math.inf]
    assert shown((dense, flash), seen[-1]) == [f"done in 4.0 s, {slow}", f"done in 2.0 s, {fast}"]


def test_no_bar_without_rounds(loaded, capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    compare(*loaded, "hello", max_tokens=4, rounds=0, console=console)
    assert "round" not in capsys.readouterr().err and "median" not in console.file.getvalue()
    assert "seconds for this text" in console.file.getvalue()
