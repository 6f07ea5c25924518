"""Limits of connections and of time, against clients that are slow or many."""

import json
import socket
import time
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from threading import Event, Thread

import pytest

from mlx_flashhead.serving.network import connections
from scripted_server import ScriptedHandler, scripted_server

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


def ask(port, path="/health", body=None):
    """(status, JSON)."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET" if body is None else "POST", path, body)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def connect(port, data=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(data)
    return connection


def trickle(connection, seconds):
    """Sends a byte now and then: → seconds until the server had enough."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            connection.sendall(b"x")
        except OSError:
            break
        connection.settimeout(0.02)
        try:
            if connection.recv(1 << 16) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: "])
def test_a_slow_head_is_given_up(monkeypatch, sent):
    """However many bytes keep coming."""
    monkeypatch.setattr(ScriptedHandler, "head_seconds", 0.2)
    with scripted_server() as (port, _), connect(port, sent) as connection:
        assert trickle(connection, 10) < 5


def test_a_slow_body_is_given_up_and_told(monkeypatch):
    monkeypatch.setattr(ScriptedHandler, "body_seconds", 0.2)
    with scripted_server() as (port, script), connect(port, HEAD) as connection:
        stop = Event()

        def send():
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = Thread(target=send)
        thread.start()
        answer = b""
        while not answer.endswith(b"}}") and (part := connection.recv(1 << 16)):
            answer += part
        stop.set()
        thread.join()
        assert b" 408 " in answer and b"within 0.2 seconds" in answer
        assert not script.requests


def test_health_is_answered_however_many_connections_wait():
    with ExitStack() as stack:
        port, _ = stack.enter_context(scripted_server())
        held = [stack.enter_context(connect(port, b"G")) for _ in range(3 * connections.MAX_UNREAD)]
        began = time.monotonic()
        for _ in range(5):
            assert ask(port) == (200, {"status": "ok"})
        assert time.monotonic() - began < 5
        gone = 0
        for connection in held:
            connection.settimeout(0.001)
            with suppress(TimeoutError):
                gone += connection.recv(1) == b""
        assert gone >= 2 * connections.MAX_UNREAD  # the oldest have made room


def test_requests_of_an_address_are_limited_and_health_is_not(monkeypatch):
    monkeypatch.setattr(connections, "MAX_ANSWERED_PER_ADDRESS", 3)
    with ExitStack() as stack:
        port, script = stack.enter_context(scripted_server())
        go = Event()
        script.answers = [[go, "done"] for _ in range(3)]
        body = json.dumps({"messages": []}).encode()
        request = HEAD.replace(b"1000", str(len(body)).encode()) + body
        held = [stack.enter_context(connect(port, request)) for _ in range(3)]
        while len(script.requests) < 3:
            time.sleep(0.01)
        status, answer = ask(port, "/v1/chat/completions", body)
        assert status == 429
        assert "3 requests of your address" in answer["error"]["message"]
        assert ask(port)[0] == 200
        go.set()
        for connection in held:
            while connection.recv(1 << 16):
                pass
        script.answers = ["as before"]
        assert ask(port, "/v1/chat/completions", body)[0] == 400


def test_requests_are_limited_in_total(monkeypatch):
    monkeypatch.setattr(connections, "MAX_ANSWERED", 1)
    with ExitStack() as stack:
        port, script = stack.enter_context(scripted_server())
        go = Event()
        script.answers = [[go]]
        stack.enter_context(connect(port, HEAD.replace(b"1000", b"2") + b"{}"))
        while not script.requests:
            time.sleep(0.01)
        status, answer = ask(port, "/v1/chat/completions", b"{}")
        assert (status, "Too many requests" in answer["error"]["message"]) == (503, True)
        go.set()
