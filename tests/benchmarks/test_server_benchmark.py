"""Servers under load: what counts as answered or lost, and what a client rejects."""

import socket
from threading import Thread

import pytest

from mlx_flashhead.benchmarks import server_benchmark as server
from mlx_flashhead.benchmarks.server_benchmark import ask

ALONE = {"first": "one", "second": "two"}


def caption(load):
    about = {"model": "m", "clients": 3, "requests": 3, "tokens": 4}
    return server.make_table(about | {"loads": {"FlashHead": load}}).caption


def loaded(monkeypatch, ask, requests):
    monkeypatch.setattr(server, "ask", ask)
    monkeypatch.setattr(server, "questions", lambda: list(ALONE))
    replies = []
    assert server.visit(0, 3, requests, 4, replies, 0) == 0 and not replies  # it warms up
    return server.figures(replies, ALONE, [server.visit(0, 3, requests, 4, replies, 1)])


def test_answers_are_compared_with_those_alone(monkeypatch):
    replies = {"first": server.Reply("two", 5, 0.5), "second": server.Reply("two", 5, 0.25)}

    def ask(port, question, *, max_tokens, hang_up):
        return server.Reply("o", None, 0.75) if hang_up else replies[question]

    load = loaded(monkeypatch, ask, 2 * server.HANGS_UP)
    assert (load["answered"], load["hung_up"], load["lost"]) == (2 * server.HANGS_UP - 2, 2, 0)
    # both questions have as many clients, and one client of each hangs up
    assert load["as_alone"] == server.HANGS_UP - 1
    assert load["first_seconds"] == {"median": 0.5, "worst": 0.75}
    assert "\nAnswers lost: 0." in caption(load)


def test_lost_answers_are_counted_with_their_reasons(monkeypatch):
    def ask(port, question, **_):
        raise ValueError("the stream broke off")

    load = loaded(monkeypatch, ask, 3)
    assert (load["answered"], load["lost"]) == (0, 3)
    assert "Answers lost: 3.\n'first': the stream broke off" in caption(load)


@pytest.mark.parametrize(
    "status, body, message",
    [
        (503, '{"error": "busy"}', '503: {"error": "busy"}'),
        (200, 'data: {"error": {"message": "failed"}}\n\n', "failed"),
        (200, 'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "without its usage"),
    ],
)
def test_an_answer_that_is_not_complete_is_refused(status, body, message):
    def answer():
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        connection.sendall(f"HTTP/1.1 {status} OK\r\n\r\n{body}".encode())
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=answer).start()
        with pytest.raises(ValueError, match=message):
            ask(listener.getsockname()[1], "question", max_tokens=1)


def test_a_server_that_does_not_start_is_one_sentence():
    with pytest.raises(ValueError, match=r"mlx_flashhead.server .* did not start: error: "):
        server.serving("mlx_flashhead.server", "--no-such-flag").__enter__()
