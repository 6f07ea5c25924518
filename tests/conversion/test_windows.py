"""Windows of text: of given text every kind, in turns."""

from collections import Counter

import mlx_lm
import pytest

from mlx_flashhead.conversion import windows
from mlx_flashhead.conversion.given_text import KINDS
from mlx_flashhead.conversion.windows import CONTEXT, given_windows, windows_of
from model_folders import write_model


@pytest.mark.parametrize("options", [{}, {"chat_template": None}], ids=["chat", "plain"])
def test_the_kinds_take_turns(options, tmp_path, monkeypatch):
    """50 positions of each kind, twice as many of the languages; the first windows are of all."""
    _, tokenizer = mlx_lm.load(str(write_model(tmp_path / "m", **options)))
    kinds, kind_of = iter(KINDS), {}

    def chosen_windows(*args, choose=windows._chosen_windows):
        chosen = choose(*args)
        kind_of.update(dict.fromkeys(map(tuple, chosen), next(kinds)))
        return chosen

    monkeypatch.setattr(windows, "_chosen_windows", chosen_windows)
    found = given_windows(tokenizer, 500)
    counts = Counter()
    for window in found:
        counts[kind_of[tuple(window)]] += len(window) - 1 - CONTEXT
    assert counts == {kind: 50 * windows.SHARES[kind] for kind in KINDS}
    assert {kind_of[tuple(window)] for window in found[: len(KINDS)]} == set(KINDS)


def test_windows_begin_with_the_token_that_ended_the_one_before():
    assert windows_of(list(range(8)), 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert windows_of([1, 2, 3, 4], 3) == [[1, 2, 3, 4]]


def test_long_documents_do_not_crowd_out_others():
    documents = [list(range(300)), list(range(1000, 1080)), list(range(2000, 2020))]
    chosen = windows._chosen_windows(documents, [], 150)
    assert sum(len(window) - 1 - CONTEXT for window in chosen) == 150
    assert {window[0] for window in chosen[:3]} == {0, 1000, 2000}
    assert all(len(window) >= windows.LEAST_TOKENS for window in chosen)


def test_what_begins_a_text_is_not_taken_for_text():
    chosen = windows._chosen_windows([[7, *range(20, 40)]], [7], 100)
    assert chosen == [list(range(20, 40))]
