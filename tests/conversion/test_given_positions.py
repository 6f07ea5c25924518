"""Given text: every kind, as much of each, and its last quarter held out."""

import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.conversion import calibration
from mlx_flashhead.conversion.given_positions import (
    CONTEXT,
    LEAST_WINDOW,
    SHARES,
    _chosen_windows,
    given_positions,
)
from mlx_flashhead.conversion.given_text import KINDS
from mlx_flashhead.conversion.positions import Positions
from mlx_flashhead.conversion.steps import Stopwatch
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
    return given_positions(*loaded, positions, progress=False, **kwargs)


def test_as_many_positions_of_each_kind(loaded):
    found = found_in(loaded)
    assert found.names == KINDS
    counts = np.bincount(found.kinds)
    assert dict(zip(KINDS, counts, strict=True)) == {kind: 60 * SHARES[kind] for kind in KINDS}
    for kind, count in enumerate(counts):
        held_out = found.held_out[found.kinds == kind]
        assert held_out.sum() == round(count / 4)
        assert held_out[-held_out.sum() :].all()
    assert found.states.dtype == np.float32
    assert len(found.states) == len(found.next_ids) == len(found)


def test_fewer_positions_of_every_kind_when_the_time_is_up(loaded, monkeypatch):
    monkeypatch.setattr(calibration, "READ_TOKENS", 700)  # one window of each kind
    limit = Stopwatch(1e-9)
    found = found_in(loaded, positions=4000, limit=limit)
    assert found.names == KINDS
    assert len(found) < 1000 and limit.cut_short


def test_long_documents_do_not_crowd_out_others():
    documents = [list(range(300)), list(range(1000, 1080)), list(range(2000, 2020))]
    chosen = _chosen_windows(documents, [], 150)
    assert sum(len(window) - 1 - CONTEXT for window in chosen) == 150
    assert {window[0] for window in chosen[:3]} == {0, 1000, 2000}
    assert all(len(window) >= LEAST_WINDOW for window in chosen)


def test_what_begins_a_text_is_not_taken_for_text():
    chosen = _chosen_windows([[7, *range(20, 40)]], [7], 100)
    assert chosen == [list(range(20, 40))]


def test_joined_and_parted():
    parts = [
        Positions.of_one_kind(name, np.full((n, 2), n, np.float32), np.arange(n))
        for name, n in (("one", 8), ("two", 1), ("three", 2))
    ]
    joined = Positions.joined(parts)
    assert joined.names == ("one", "two", "three")
    np.testing.assert_array_equal(np.bincount(joined.kinds), [8, 1, 2])
    held_out, fitted_on = joined.parted()
    np.testing.assert_array_equal(held_out.kinds, [0, 0, 2])  # a single one is fitted on
    assert len(fitted_on) == 8 and len(held_out) == 3
    np.testing.assert_array_equal(held_out.next_ids, [6, 7, 1])
