"""Limits of connections and of time, against clients that are slow or many."""

import json
import select
import time
from contextlib import suppress
from threading import Event

import pytest

from mlx_flashhead.serving.network import connections
from scripted_server import ScriptedHandler

CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def trickle(connection, enough=lambda answer: False):
    """Sends a byte now and then, until the server has had enough: → what it answered."""
    began, answer = time.monotonic(), b""
    connection.settimeout(0.02)
    with suppress(OSError):
        while time.monotonic() - began < 10 and not enough(answer):
            connection.sendall(b"x")
            with suppress(TimeoutError):
                if (part := connection.recv(1 << 16)) == b"":
                    break
                answer += part
    assert time.monotonic() - began < 5
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: "])
def test_a_slow_head_is_given_up(monkeypatch, connect, sent):
    """However many bytes keep coming."""
    monkeypatch.setattr(ScriptedHandler, "head_seconds", 0.2)
    trickle(connect(sent))


def test_a_slow_body_is_given_up_and_told(monkeypatch, server, connect):
    monkeypatch.setattr(ScriptedHandler, "body_seconds", 0.2)
    answer = trickle(connect(HEAD % 1000), lambda answer: answer.endswith(b"}}"))
    assert b" 408 " in answer and b"within 0.2 seconds" in answer
    assert not server[1].requests


def test_health_is_answered_however_many_connections_wait(monkeypatch, ask, connect):
    monkeypatch.setattr(connections, "MAX_UNREAD", 8)
    held = [connect(b"G") for _ in range(24)]
    began = time.monotonic()
    for _ in range(5):
        assert ask("/health")[0].status == 200
    assert time.monotonic() - began < 5
    closed = select.select(held, [], [], 0)[0]  # readable, since they have ended
    assert len(closed) >= 16  # the oldest have made room


@pytest.mark.parametrize(
    "limit, status, said",
    [
        ("MAX_ANSWERED_PER_ADDRESS", 429, "3 requests of your address"),
        ("MAX_ANSWERED", 503, "Too many requests"),
    ],
)
def test_requests_are_limited_and_health_is_not(
    monkeypatch, server, ask, connect, limit, status, said
):
    script = server[1]
    monkeypatch.setattr(connections, limit, 3)
    go = Event()
    script.answers = [[go, "done"] for _ in range(3)]
    held = [connect(HEAD % 2 + b"{}") for _ in range(3)]
    while len(script.requests) < 3:
        time.sleep(0.01)
    response, content = ask(CHAT, "POST", b"{}")
    assert response.status == status and response.headers["Retry-After"] == "2"
    assert said in json.loads(content)["error"]["message"]
    assert ask("/health")[0].status == 200
    go.set()
    for connection in held:
        while connection.recv(1 << 16):
            pass
    script.answers = ["as before"]
    assert ask(CHAT, "POST", b"{}")[0].status == 400
