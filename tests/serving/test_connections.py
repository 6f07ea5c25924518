"""Limits of connections and of time, against clients that are slow, many, or leave."""

import asyncio
import json
import select
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from unittest.mock import AsyncMock, Mock

import pytest
import uvicorn

from mlx_flashhead.serving import connections
from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.serve import Server

CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def received(connection):
    """Everything that comes until the server closes the connection."""
    with suppress(ConnectionError):
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def trickle(connection):
    """Sends a byte now and then, until the server has had enough: → what it answered."""
    answer = b""
    connection.settimeout(0.02)
    with suppress(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"x")
            with suppress(TimeoutError):
                part = connection.recv(1 << 16)
                if part == b"":
                    return answer
                answer += part
        raise AssertionError("the server still waits")
    return answer


def wait_for_ends(opened, number):
    """Waits until the server has closed so many connections: they are readable then."""
    until = time.monotonic() + 20
    while len(select.select(opened, [], [], 0)[0]) < number:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_slow_head_is_abandoned(monkeypatch, connect):
    """However many bytes keep coming."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    for sent in (b"", b"GET / HTTP/1.1\r\nHost: "):
        assert trickle(connect(sent)) == b""


def test_a_slow_body_is_abandoned_with_an_error(monkeypatch, script, connect):
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(connections, "REFUSED_SECONDS", 0.2)
    answer = trickle(connect(HEAD % 1000))
    assert b" 408 " in answer and b"within 0.2 seconds" in answer
    assert not script.requests


def test_a_client_that_reads_nothing_is_left(monkeypatch, script, connect):
    """Its answer is larger than all buffers between the two."""
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.2)
    script.answers = [["x" * 20_000_000, Event()]]
    connect(HEAD % 2 + b"{}")
    assert script.left.wait(60)


@pytest.mark.parametrize("after", [b"", b"\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("together", [True, False])
def test_a_client_that_leaves_is_noticed_whatever_it_has_sent_before(
    script, connect, after, together
):
    script.answers = [[Event()]]
    sent = HEAD % 2 + b"{}"
    if together:
        sent += after
    connection = connect(sent)
    while not script.requests:
        time.sleep(0.01)
    if not together:
        connection.sendall(after)
    connection.close()
    assert script.left.wait(60)


def test_bytes_after_a_request_are_bounded(script, connect):
    script.answers = [[Event()]]
    connection = connect(HEAD % 2 + b"{}")
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"x" * 10_000)
    assert script.left.wait(60)


def test_a_client_that_only_sends_no_more_has_what_is_ready(monkeypatch, connect):
    # A machine that is busy needs as long.
    monkeypatch.setattr(connections, "HALF_CLOSED_SECONDS", 2)
    connection = connect(HEAD % 2 + b"{}")
    connection.shutdown(socket.SHUT_WR)
    assert received(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_health_is_answered_however_many_connections_wait(monkeypatch, ask, connect):
    monkeypatch.setattr(connections, "MAX_WAITING", 8)
    opened = [connect(b"G") for _ in range(24)]
    for _ in range(5):
        assert ask("/health")[0].status == 200
    # The oldest have made room.
    wait_for_ends(opened, 16)


@pytest.mark.parametrize(
    "limit, status, message",
    [
        ("MAX_ANSWERED_PER_ADDRESS", 429, "3 requests of your address"),
        ("MAX_ANSWERED", 503, "Too many requests"),
    ],
)
def test_requests_are_limited_and_health_is_not(
    monkeypatch, script, ask, connect, limit, status, message
):
    monkeypatch.setattr(connections, limit, 3)
    go = Event()
    script.answers = [[go, "done"] for _ in range(3)]
    opened = [connect(HEAD % 2 + b"{}") for _ in range(3)]
    while len(script.requests) < 3:
        time.sleep(0.01)
    response, content = ask(CHAT, "POST", b"{}")
    assert response.status == status and response.headers["Retry-After"] == "2"
    assert message in json.loads(content)["error"]["message"]
    assert ask("/health")[0].status == 200
    go.set()
    for connection in opened:
        assert b"[DONE]" in received(connection)
    script.answers = ["as before"]
    assert ask(CHAT, "POST", b"{}")[0].status == 400


def test_bodies_that_never_come_take_nobodys_place(monkeypatch, script, ask, connect):
    """Until a body has arrived, its connection is one of those that wait."""
    for limit in ("MAX_ANSWERED_PER_ADDRESS", "MAX_ANSWERED", "MAX_WAITING"):
        monkeypatch.setattr(connections, limit, 3)
    opened = [connect(HEAD % 1000 + b"{") for _ in range(9)]
    # The oldest have made room.
    wait_for_ends(opened, 6)
    for _ in range(4):
        assert ask(CHAT, "POST", b"{}")[0].status == 200
    connection = connect(HEAD % 2 + b"{")
    connection.sendall(b"}")
    assert b"[DONE]" in received(connection)
    assert len(script.requests) == 5


REQUESTS = {
    "nothing": b"",
    "half a head": b"POST / HTTP/1.1\r\n",
    "no HTTP": b"bad\r\n\r\n",
    "a page": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a chat": HEAD % 2 + b"{}",
    "half a chat": HEAD % 1000 + b"{}",
    "another path": b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("sent", REQUESTS.values(), ids=REQUESTS)
def test_clients_that_reset_at_once_leave_no_traceback(script, ask, connect, caplog, sent):
    for _ in range(20):
        connection = connect(sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert ask("/health")[0].status == 200
    assert ask(CHAT, "POST", b"{}")[0].status == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_method_of_any_length_is_logged_in_short(script, connect):
    connection = connect(b"A" * 90_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 405 " in received(connection)
    while not script.log:
        time.sleep(0.01)
    assert script.log[0].startswith(f"127.0.0.1 {'A' * 20} / 405")


def test_many_connections_wait_to_be_accepted(monkeypatch):
    """Those that find no room try again after a second, and then after two, four and eight."""
    listener = Mock()
    monkeypatch.setattr(uvicorn.Server, "startup", AsyncMock())
    with ThreadPoolExecutor(1) as thread:
        server = Server(None, Access())
        thread.submit(asyncio.run, server.startup([listener])).result()
    listener.listen.assert_called_once_with(1024)
