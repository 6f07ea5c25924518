"""The mix: every kind, as much of each, and its last quarter held out."""

from itertools import islice

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.conversion import calibration, mix
from mlx_flashhead.conversion.given_text import KINDS
from mlx_flashhead.conversion.mix import ANSWERS, mixed_positions
from mlx_flashhead.conversion.positions import Positions
from mlx_flashhead.conversion.prompts import chat_prompts
from mlx_flashhead.conversion.steps import Step, Stopwatch, stepwise
from mlx_flashhead.models.locate import find_head
from model_folders import write_model


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def loaded(request, tmp_path_factory):
    options = {} if request.param else {"chat_template": None}
    model, tokenizer = mlx_lm.load(
        str(write_model(tmp_path_factory.mktemp("models") / "m", **options))
    )
    return model, tokenizer, find_head(model)


def found_in(loaded, positions=600, **kwargs):
    return mixed_positions(*loaded, positions, progress=False, **kwargs)


def test_as_many_positions_of_each_kind(loaded):
    found = found_in(loaded)
    assert found.names == (*KINDS, *ANSWERS)
    counts = np.bincount(found.kinds)
    given = counts[: len(KINDS)]  # 5/6 of 600 by 10, and twice as much of the languages
    assert dict(zip(KINDS, given, strict=True)) == {kind: 50 * mix.SHARES[kind] for kind in KINDS}
    assert (counts[len(KINDS) :] == 50).all()
    for kind, count in enumerate(counts):
        held_out = found.held_out[found.kinds == kind]
        assert held_out.sum() == round(count / 4)
        assert held_out[-held_out.sum() :].all()
    assert found.states.dtype == np.float32
    assert len(found.states) == len(found.next_ids) == len(found)


def test_the_states_are_those_of_the_text(loaded):
    """The greedy answers' next tokens follow from their states; of given text the last window's."""
    found = found_in(loaded)
    head = found.states @ np.array(loaded[2].rows().dequantized(mx.float32)).T
    greedy = found.kinds == found.names.index("answers, greedy")
    np.testing.assert_array_equal(head[greedy].argmax(axis=1), found.next_ids[greedy])


def test_the_same_seed_gives_the_same_mix(loaded):
    first, again, other = (found_in(loaded, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.states, again.states)
    given = first.kinds < len(KINDS)
    np.testing.assert_array_equal(first.states[given], other.states[given])
    assert (first.next_ids[~given] != other.next_ids[~given]).any()


def test_given_text_alone(loaded):
    found = found_in(loaded, written_share=0.0)
    assert found.names == KINDS
    assert len(found) == 600


def test_fewer_positions_of_every_kind_when_the_time_is_up(loaded, monkeypatch):
    monkeypatch.setattr(calibration, "READ_TOKENS", 700)  # one window of each kind
    limit = Stopwatch(1e-9)
    found = found_in(loaded, positions=4000, limit=limit)
    assert set(found.names) >= set(KINDS)
    assert len(found) < 1000 and limit.cut_short


@pytest.mark.parametrize(
    ("reading", "writing", "counts"),
    [
        (0.05, 0.1, (1000, 200)),  # there is time for all
        (0.2, 1.0, (300, 60)),  # half of the time each
        (0.01, 1.0, (1000, 60)),  # writing has no more than its half
        (0.1, 0.1, (1000, 200)),  # and leaves the rest of it to reading
    ],
)
def test_writing_leaves_time_to_read(loaded, monkeypatch, reading, writing, counts):
    """``reading`` and ``writing`` seconds a token, 120 seconds in all."""
    width = 2

    def read_windows(model, location, windows, *, limit, **kwargs):
        states = []
        for window in windows:
            late = limit.left < 0
            states.append(np.ones((0 if late else len(window) - 1, width), np.float32))
            limit.left -= reading * max(0, len(states[-1]) - mix.CONTEXT)
        yield Step("", 1, 1, "")
        return states

    def generated_states(*args, limit, until, **kwargs):
        count = min(args[4], round((limit.left - until) / writing))
        limit.left -= writing * count
        yield Step("", 1, 1, "")
        return np.ones((count, width), np.float32), np.ones(count, np.int64)

    monkeypatch.setattr(mix, "read_windows", stepwise(read_windows))
    monkeypatch.setattr(mix, "generated_states", stepwise(generated_states))
    limit = Stopwatch(120)
    found = mixed_positions(*loaded, 1200, limit=limit, progress=False)
    given = np.isin(np.array(found.names)[found.kinds], KINDS)
    assert given.sum() == pytest.approx(counts[0], abs=60)  # of a window
    assert (~given).sum() == pytest.approx(counts[1], abs=2)
    assert limit.left > -12


def test_requests_are_many_and_in_the_models_form(loaded):
    tokenizer = loaded[1]
    prompts = list(islice(chat_prompts(tokenizer, np.random.default_rng(0)), 50))
    assert len({tuple(prompt) for prompt in prompts}) > 40
    for text in map(tokenizer.decode, prompts):
        assert text.endswith("[assistant] ") == tokenizer.has_chat_template
        assert ("[user]" in text) == tokenizer.has_chat_template


def test_long_documents_do_not_crowd_out_others():
    documents = [list(range(300)), list(range(1000, 1080)), list(range(2000, 2020))]
    chosen = mix._chosen_windows(documents, [], 150)
    assert sum(len(window) - 1 - mix.CONTEXT for window in chosen) == 150
    assert {window[0] for window in chosen[:3]} == {0, 1000, 2000}
    assert all(len(window) >= mix.LEAST_WINDOW for window in chosen)


def test_what_begins_a_text_is_not_taken_for_text():
    chosen = mix._chosen_windows([[7, *range(20, 40)]], [7], 100)
    assert chosen == [list(range(20, 40))]


def test_joined_and_parted():
    parts = [
        Positions.of_one_kind(name, np.full((n, 2), n, np.float32), np.arange(n), 1 / 4)
        for name, n in (("one", 8), ("two", 1), ("three", 2))
    ]
    joined = Positions.joined(parts)
    assert joined.names == ("one", "two", "three")
    np.testing.assert_array_equal(np.bincount(joined.kinds), [8, 1, 2])
    held_out, fitted_on = joined.parted()
    np.testing.assert_array_equal(held_out.kinds, [0, 0, 2])  # a single one is fitted on
    assert len(fitted_on) == 8 and len(held_out) == 3
    np.testing.assert_array_equal(held_out.next_ids, [6, 7, 1])
