"""The demo's race, on a tiny model."""

import io

import pytest
from rich.console import Console

import demo
from demo import compare, encode, race
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
