"""Given text: what the package and Python's standard library hold, and windows of every kind."""

from collections import Counter

import mlx_lm
import pytest

from mlx_flashhead.conversion import given_text
from mlx_flashhead.conversion.given_text import (
    CONTEXT,
    LEAST_TOKENS,
    PYTHON,
    SHARES,
    dialogues,
    given_documents,
    given_windows,
    windows_of,
)
from mlx_flashhead.evaluation.answers import usual_requests
from model_folders import write_model


@pytest.fixture(scope="module")
def documents():
    return given_documents()


def test_every_kind_has_several_documents(documents):
    assert len(documents) >= 6
    for found in documents.values():
        assert len(set(found)) == len(found) >= 6
        assert all(len(document) > 50 for document in found)


def test_what_an_installation_lacks_is_left_out(monkeypatch, documents):
    assert "def " in "".join(documents[PYTHON])
    assert len(documents[PYTHON]) > 30
    own = len(given_text._documents("documentation"))
    assert len(documents["documentation"]) > own + 30
    few = {"modules": "no_such_module textwrap _thread", "topics": "no-such-topic with"}
    read = given_text._file
    monkeypatch.setattr(given_text, "_file", lambda name: few.get(name) or read(name))
    found = given_documents()
    assert len(found[PYTHON]) == 1
    assert len(found["documentation"]) == 1 + own
    assert found["prose"] == documents["prose"]


def test_dialogues_alternate_and_are_no_requests_of_the_evaluation():
    found = dialogues()
    assert len(found) > 10
    for messages in found:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        contents = [m["content"] for m in messages]
        assert all(text == text.strip() and "User:" not in text for text in contents)
        assert not set(contents) & set(usual_requests())


@pytest.mark.parametrize("options", [{}, {"chat_template": None}], ids=["chat", "plain"])
def test_the_kinds_take_turns(options, tmp_path, monkeypatch):
    """50 positions of each kind, twice as many of the languages; the first windows are of all."""
    _, tokenizer = mlx_lm.load(str(write_model(tmp_path / "m", **options)))
    kinds, kind_of = iter(SHARES), {}

    def chosen_windows(*args, choose=given_text._chosen_windows):
        chosen = choose(*args)
        kind_of.update(dict.fromkeys(map(tuple, chosen), next(kinds)))
        return chosen

    monkeypatch.setattr(given_text, "_chosen_windows", chosen_windows)
    found = given_windows(tokenizer, 500)
    counts = Counter()
    for window in found:
        counts[kind_of[tuple(window)]] += len(window) - 1 - CONTEXT
    assert counts == {kind: 50 * share for kind, share in SHARES.items()}
    assert {kind_of[tuple(window)] for window in found[: len(SHARES)]} == set(SHARES)


def test_windows_begin_with_the_token_that_ended_the_one_before():
    assert windows_of(list(range(8)), 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert windows_of([1, 2, 3, 4], 3) == [[1, 2, 3, 4]]


def test_long_documents_do_not_crowd_out_others_and_what_begins_a_text_is_no_text():
    documents = [list(range(300)), list(range(1000, 1080)), [7, *range(2000, 2020)]]
    chosen = given_text._chosen_windows(documents, [7], 150)
    assert sum(len(window) - 1 - CONTEXT for window in chosen) == 150
    assert {window[0] for window in chosen[:3]} == {0, 1000, 2000}
    assert all(len(window) >= LEAST_TOKENS for window in chosen)
