"""A history, and signals while a line is edited. test_chat.py completes and edits lines."""

import signal

import pytest
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_flashhead.common.line_editor import line_editor
from mlx_flashhead.common.terminal import is_open


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
            read = line_editor("> ", is_open, [], [], place)
            typed.send_text(answer.replace("\n", "\x1b\r") + "\r")
            assert read() == answer
    assert list(FileHistory(file).load_history_strings()) == [answer, "a question"]
    assert file.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_signal_ends_the_editor_first(tmp_path, monkeypatch, waits):
    """When it starts or waits: out of an event loop the handler's exception may be lost."""

    def end(number, frame):
        raise SystemExit(128 + number)

    prompt = PromptSession.prompt

    def prompt_with_signal(session, text, pre_run):
        def started():
            if not waits:
                signal.raise_signal(signal.SIGTERM)
            pre_run()
            session.app.loop.call_later(0.1, signal.raise_signal, signal.SIGTERM)

        return prompt(session, text, pre_run=started)

    monkeypatch.setattr(PromptSession, "prompt", prompt_with_signal)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with create_pipe_input() as typed, create_app_session(typed, DummyOutput()):
            read = line_editor("> ", is_open, [], [], tmp_path / "history")
            with pytest.raises(SystemExit) as caught:
                read()
        assert caught.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
