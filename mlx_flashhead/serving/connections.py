"""Connections: how many there are, and how long a client may take to send and to read.

uvicorn waits for ever for a request's head and for a client that reads nothing, so its protocol has
timers here. A connection carries one request: uvicorn stops reading when more bytes follow a
request, and would then not see that the client has left.
"""

import sys
from asyncio import TimerHandle, Transport
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_error import ApiError, dumps

# Connections without a request that is being answered. Beyond this, the address with most of them
# loses its oldest.
MAX_WAITING = 64
# Requests in progress, in total and for one address.
MAX_ANSWERED = 128
MAX_ANSWERED_PER_ADDRESS = 32
MAX_HEAD_BYTES = 96 << 10
# For a request's head, and for a client that does not read.
HEAD_SECONDS, WRITE_SECONDS = 10.0, 30.0
# A refused client that still sends may read why. One that sends no more gets what is ready by then.
REFUSED_SECONDS, HALF_CLOSED_SECONDS = 2.0, 0.2


class Connections:
    """The open connections of a server, all in its event loop."""

    def __init__(self) -> None:
        self.waiting: dict[Any, Connection] = {}  # by both ends' addresses, the oldest first
        self._answered: Counter[str] = Counter()

    def add(self, connection: "Connection") -> None:
        """Takes a new connection in. The oldest waiting one may be closed for it."""
        if len(self.waiting) >= MAX_WAITING:
            (address, _), *_ = Counter(host for (host, _), _ in self.waiting).most_common(1)
            oldest = next(ends for ends in self.waiting if ends[0][0] == address)
            self.waiting.pop(oldest).transport.abort()
        self.waiting[connection.ends] = connection

    @contextmanager
    def answering(self, scope: Any) -> Iterator[None]:
        """A block in which a request is answered; an ApiError if there are too many."""
        address = scope["client"][0]
        if self._answered[address] >= (most := MAX_ANSWERED_PER_ADDRESS):
            answered = f"{most} requests of your address are being answered"
            raise ApiError(f"{answered}: wait for one of them to end.", status=429)
        if self._answered.total() >= MAX_ANSWERED:
            raise ApiError("Too many requests at once: try again in a moment.", status=503)
        self.waiting.pop((scope["client"], scope["server"]), None)
        self._answered[address] += 1
        try:
            yield
        finally:
            self._answered -= Counter([address])  # drops counts of 0


class Connection(H11Protocol):
    """A connection of uvicorn's, with deadlines."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections
        self._head_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._refused = False
        self._n_ignored = 0  # bytes after the request

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.ends = self.client or ("", 0), self.server
        self._connections.add(self)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.waiting.pop(self.ends, None)
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._complete:
            self._n_ignored += len(data)
            if self._n_ignored > MAX_HEAD_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        if self.cycle is not None and self._head_timer is not None:
            self._head_timer.cancel()
        if self._complete:
            self.flow.resume_reading()  # so that the end of the connection is noticed

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if not self._complete:
            return None
        self.loop.call_later(HALF_CLOSED_SECONDS, self.transport.close)
        return True

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP with an error like all others."""
        if self.cycle is not None:
            self.transport.abort()
            return
        status = getattr(sys.exception(), "error_status_hint", 400)
        text = "The request is not HTTP/1.1."
        if status == 431:
            text = f"The request's head has more than {MAX_HEAD_BYTES:,} bytes: send less."
        body = dumps(ApiError(text, status=status).as_json()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        head = h11.Response(status_code=status, headers=[*headers, ("Connection", "close")])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        self.transport.write_eof()
        self.loop.call_later(REFUSED_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._connections.waiting[self.ends] = self  # until the client has read it
        self._allow_for_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._allow_for_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def _allow_for_reading(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    @property
    def _complete(self) -> bool:
        """Whether the request has been received."""
        return self.cycle is not None and not self.cycle.more_body
