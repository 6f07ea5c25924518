"""A history. test_chat.py completes and edits lines, and ends the editor by signals."""

from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_flashhead.common.line_editor import line_editor


def test_the_history_is_its_users_alone_and_may_be_missing(tmp_path):
    (tmp_path / "file").touch()
    file = tmp_path / "new" / "history"
    nowhere = tmp_path / "file" / "history"
    for place, answer in (
        (file, "a question"),
        (nowhere, "another question"),
        (file, "one\nquestion of two lines"),
    ):
        with create_pipe_input() as typed, create_app_session(typed, DummyOutput()):
            read = line_editor("> ", [], [], place)
            typed.send_text(answer.replace("\n", "\x1b\r") + "\r")
            assert read() == answer
    assert list(FileHistory(file).load_history_strings()) == [answer, "a question"]
    assert file.parent.stat().st_mode & 0o077 == 0
