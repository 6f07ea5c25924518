"""The drafter that is trained for the figures: its chain of drafts, and how its figures follow."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

import trained_drafter
from drafter_training import chain, new_drafter
from pages import CHECKOUT, with_block
from trained_drafter import figures_of, steps_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@pytest.fixture
def target():
    norm = SimpleNamespace(weight=mx.ones(32))
    inner = SimpleNamespace(norm=norm)
    return SimpleNamespace(
        args=SimpleNamespace(**SIZES), model=SimpleNamespace(model=inner), rows=None
    )


def test_drafts_of_all_places_are_those_of_mlx_vlms_loop(target):
    """Each place by itself: the text up to it is read, and what follows is drafted from it."""
    mx.random.seed(0)
    drafter = new_drafter(target)
    table = mx.random.normal((50, 32))
    tokens = mx.random.randint(0, 50, (1, 12))
    states = mx.random.normal((1, 8, 32))
    found = list(chain(drafter, table[tokens], states, 3))
    for place in (0, 3, 7):
        drafter._cache = drafter.make_cache()
        drafter._next_position = 0
        drafter._input_embed = lambda ids: table[ids]
        read = slice(0, place + 1)
        hidden = drafter._forward_tokens(tokens[:, 1 : place + 2], states[:, read], mx.int32)
        for depth in range(3):
            expected = hidden[0, -1]
            assert mx.allclose(found[depth][0, place], expected, atol=1e-5).item()
            following = tokens[:, place + depth + 2 : place + depth + 3]
            hidden = drafter._forward_tokens(following, hidden[:, -1:], mx.int32)


def test_steps_and_shares_follow_from_the_runs():
    run = np.array([2, 0, 1, 0, 3, 2, 1])
    assert steps_of(run, 4) == [2, 0, 3]
    assert steps_of(run, 2) == [1, 1, 1, 1]
    found = figures_of([run])
    # The last token has no second one behind it.
    assert found["tried"][:3] == [7, 4, 2]
    assert found["right"][:3] == [5, 3, 1]
    assert found["tokens_a_step"]["4"] == pytest.approx(7 / 3, abs=1e-4)


def test_the_page_has_the_figures_of_the_file():
    file = CHECKOUT / "docs" / "benchmarks" / "trained-drafter.json"
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    page = trained_drafter.PAGE.read_text(encoding="utf-8")
    assert with_block(page, "trained drafter", trained_drafter.page_lines(figures)) == page
    for ways in figures.values():
        for of in ways.values():
            runs = [np.array(list(map(int, run))) for run in of["runs"]]
            again = figures_of(runs)
            assert again["right"] == of["right"]
            assert again["tokens_a_step"] == of["tokens_a_step"]
