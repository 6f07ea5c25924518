"""Completion of commands and files, and a history that is kept where it can be."""

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mlx_flashhead.cli.line_editor import _Commands, _KeptHistory


@pytest.fixture
def completions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deeper.json").touch()
    completer = _Commands(["/save", "/stats", "/exit"], ["/save"])

    def completions(line):
        found = completer.get_completions(Document(line), CompleteEvent())
        return [line[: len(line) + one.start_position] + one.text for one in found]

    return completions


def test_commands_and_files_are_completed(completions):
    assert completions("/s") == ["/save ", "/stats "]
    assert completions("") == completions("hello") == completions("/exit ") == []
    assert completions("/save ") == ["/save a folder", "/save sub"]
    assert completions("/save sub/de") == ["/save sub/deep", "/save sub/deeper.json"]
    assert completions("/save absent/x") == []


def test_the_history_is_kept_for_its_user_alone(tmp_path):
    file = tmp_path / "new" / "history"
    _KeptHistory(file).append_string("one\nquestion of two lines")
    assert list(_KeptHistory(file).load_history_strings()) == ["one\nquestion of two lines"]
    assert file.parent.stat().st_mode & 0o077 == 0


def test_a_history_that_cannot_be_kept_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").touch()
    history = _KeptHistory(tmp_path / "file" / "history")
    history.append_string("a question")
    assert history.get_strings() == ["a question"]
