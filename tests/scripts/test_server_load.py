"""Servers under load: what counts as answered or lost, and what a client rejects."""

import json
import socket
from contextlib import contextmanager
from threading import Thread

import pytest

import server_load as server
from server_load import ask

ALONE = {"first": "one", "second": "two"}


def test_answers_are_compared_with_those_alone_and_lost_ones_counted(monkeypatch):
    seconds = {"first": 0.5, "second": 0.25}

    def ask(port, question, *, max_tokens, hang_up):
        if port == 1:
            raise ValueError("the stream broke off")
        whole = server.Reply(question, "two", 5, seconds[question])
        if hang_up:
            return server.Reply(question, "o", None, 0.75)
        return whole

    monkeypatch.setattr(server, "ask", ask)
    monkeypatch.setattr(server, "questions", lambda: list(ALONE))
    loads = []
    n = 2 * server.HANGS_UP
    for port in (0, 1):
        answers = []
        # This visit warms up.
        assert server.visit(port, 3, n, 4, answers, 0) == 0 and not answers
        loads.append(server.figures(answers, ALONE, [server.visit(port, 3, n, 4, answers, 1)]))
    load, broken = loads
    assert (load["answered"], load["hung_up"], load["lost"]) == (n - 2, 2, 0)
    # Both questions have as many clients, and one client of each hangs up.
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


def test_three_servers_are_put_under_load(run, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # The tiny model's context is short.
    monkeypatch.setattr(server, "LENGTHS", (0, 1) * 4)
    commands = []
    ports = []

    @contextmanager
    def recorded(*command, serving=server.serving):
        commands.append(command)
        if "--dense" in command:
            # The first one stands for it.
            yield ports[0]
            return
        with serving(*command) as port:
            ports.append(port)
            yield port

    monkeypatch.setattr(server, "serving", recorded)
    file = tmp_path / "out.json"
    flags = ["--model", converted, "--n-probes", 2, "--rounds", 1, "--clients", 3]
    flags += ["--requests", 6, "--tokens", 4, "--report", file, "--plot", tmp_path / "out.png"]
    code, screen, _ = run(server, *flags)
    assert code == 0 and max(map(len, screen.splitlines())) <= 80
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads(file.read_text())
    assert (figures["kind"], figures["complete"]) == ("server", True)
    assert figures["command"].startswith("python scripts/figures/server_load.py --model ")
    (result,) = figures["results"]
    assert list(result["loads"]) == ["FlashHead", "dense", "mlx_lm.server"]
    for load in result["loads"].values():
        assert load["answered"] + load["hung_up"] == 6
        assert load["as_alone"] == load["answered"]
        assert f" {load['tokens_per_second']['median']:.1f} " in screen
    assert "Answers lost: 0." in screen
    # Neither a build nor dense steps are measured.
    assert {"--build-first", "--flash-head-always"} <= set(commands[0])
