"""Servers under load: what counts as answered or lost, and what a client rejects."""

import socket
from threading import Thread

import pytest

from mlx_flashhead.benchmarks import server_benchmark as server
from mlx_flashhead.benchmarks.server_benchmark import ask

ALONE = {"first": "one", "second": "two"}


def test_answers_are_compared_with_those_alone_and_lost_ones_counted(monkeypatch):
    seconds = {"first": 0.5, "second": 0.25}

    def ask(port, question, *, max_tokens, hang_up):
        if port == 1:
            raise ValueError("the stream broke off")
        whole = server.Reply(question, "two", 5, seconds[question])
        return server.Reply(question, "o", None, 0.75) if hang_up else whole

    monkeypatch.setattr(server, "ask", ask)
    monkeypatch.setattr(server, "questions", lambda: list(ALONE))
    loads = []
    n = 2 * server.HANGS_UP
    for port in (0, 1):
        answers = []
        assert server.visit(port, 3, n, 4, answers, 0) == 0 and not answers  # it warms up
        loads.append(server.figures(answers, ALONE, [server.visit(port, 3, n, 4, answers, 1)]))
    load, broken = loads
    assert (load["answered"], load["hung_up"], load["lost"]) == (n - 2, 2, 0)
    # both questions have as many clients, and one client of each hangs up
    assert load["as_alone"] == server.HANGS_UP - 1
    assert load["first_seconds"] == {"median": 0.5, "worst": 0.75}
    assert (broken["answered"], broken["lost"]) == (0, n)
    about = {"model": "m", "clients": 3, "requests": n, "tokens": 4}
    caption = server.make_table(about | {"loads": {"FlashHead": load, "dense": broken}}).caption
    assert f"Answers lost: {n}.\n'first': the stream broke off" in caption


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
        connection.sendall(f"HTTP/1.1 {status} OK\r\n\r\n{body}".encode())
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=answer).start()
        with pytest.raises(ValueError, match=message):
            ask(listener.getsockname()[1], "question", max_tokens=1)


def test_a_server_that_does_not_start_is_one_sentence():
    with pytest.raises(ValueError, match=r"mlx_flashhead.server .* did not start: error: "):
        server.serving("mlx_flashhead.server", "--no-such-flag").__enter__()
