"""Connections: their number, and the time that a client has for its request."""

import io
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from ..protocol.errors import Problem

# Connections whose request is not read yet. Beyond this, the address with most loses its oldest.
MAX_UNREAD = 64
# Requests in progress, in total and for one address.
MAX_ANSWERED = 128
MAX_ANSWERED_PER_ADDRESS = 32
# Bytes of a request line and headers, of which the line alone may have 64 KiB.
MAX_HEAD_BYTES = 96 << 10
# Sent to a client that sends no more: an interim answer, or a comment of a stream.
_INTERIM, _COMMENT = b"HTTP/1.1 100 Continue\r\n\r\n", b": \n\n"


class LimitedServer(ThreadingHTTPServer):
    """A thread for each connection, with limits on unread and on answered ones.

    A connection counts as unread until its handler calls :meth:`answering`. An unread connection
    never waits, so a request that needs no computing is always answered.
    """

    daemon_threads = True
    request_queue_size = MAX_UNREAD  # several clients may come at once

    def __init__(self, *args, **kwargs):
        self._lock = Lock()
        self._unread: dict[socket.socket, str] = {}  # the oldest first
        self._answered: Counter[str] = Counter()
        super().__init__(*args, **kwargs)

    def process_request(self, request, client_address) -> None:
        """Starts the connection's thread. The oldest silent connection may be closed for it."""
        with self._lock:
            if len(self._unread) >= MAX_UNREAD:
                self._close_one()
            self._unread[request] = client_address[0]
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        """Serves one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._unread.pop(request, None)

    @contextmanager
    def answering(self, connection: socket.socket, address: str) -> Iterator[None]:
        """A block in which a connection's request is answered.

        Raises:
            Problem: If there are too many, in total or of this address.
        """
        with self._lock:
            if self._answered[address] >= MAX_ANSWERED_PER_ADDRESS:
                raise Problem(
                    f"{MAX_ANSWERED_PER_ADDRESS} requests of your address are being answered: "
                    "wait for one of them to end.",
                    status=429,
                )
            if self._answered.total() >= MAX_ANSWERED:
                raise Problem("Too many requests at once: try again in a moment.", status=503)
            self._unread.pop(connection, None)
            self._answered[address] += 1
        try:
            yield
        finally:
            with self._lock:
                self._answered -= Counter([address])  # drops counts of 0

    def handle_error(self, request, client_address) -> None:
        """Ignores a client that has left, as after *stop*."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def _close_one(self) -> None:
        (address, _), *_ = Counter(self._unread.values()).most_common(1)
        oldest = next(c for c, of in self._unread.items() if of == address)
        del self._unread[oldest]
        with suppress(OSError):  # it may be closed already
            oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it


class TimedReader(io.RawIOBase):
    """Reads from a connection until a deadline, which may be moved.

    Args:
        connection: The connection, whose time limit this sets.

    Attributes:
        deadline: In the seconds of ``time.monotonic``.
        n_left: Bytes that may be read.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.deadline = 0.0
        self.n_left: float = MAX_HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Reads the available bytes, or waits for some.

        Raises:
            TimeoutError: If the deadline has passed.
            HTTPException: If the head of a request has no end.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if self.n_left <= 0:
            raise HTTPException(f"a head has at most {MAX_HEAD_BYTES:,} bytes")
        self._connection.settimeout(left)
        n_read = self._connection.recv_into(buffer)
        self.n_left -= n_read
        return n_read


class TimedHandler(BaseHTTPRequestHandler):
    """A handler with one deadline for a request's head and one for its body.

    Attributes:
        status: Of the answer, as soon as it has begun.
    """

    server: LimitedServer
    raw_requestline: bytes
    server_version, sys_version = "mlx_flashhead", ""  # without versions
    head_seconds = 10.0
    body_seconds = 60.0
    write_seconds = 30.0  # for a client that does not read

    def setup(self) -> None:
        """Takes the place of the base class's reader."""
        super().setup()
        self._body_read = False
        self._asked_for_life = False
        self.status: HTTPStatus | None = None
        self._reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        self.allow(self.head_seconds)

    def send_response(self, code: int, message: str | None = None) -> None:
        """As the base class's. The log gets the status at the end."""
        self.status = HTTPStatus(code)
        super().send_response(code, message)

    def allow(self, seconds: float) -> None:
        """Gives the client ``seconds`` for its next data."""
        self._reader.deadline = time.monotonic() + seconds

    def parse_request(self) -> bool:
        """Reads a request's head. False if it is answered already, with a refusal for example."""
        if self.raw_requestline == b"\r\n":  # left over from a body before, by some clients
            self.raw_requestline = self.rfile.readline((64 << 10) + 1)
        head_read = super().parse_request()
        self._reader.n_left = math.inf
        return head_read

    def read_body(self, n_bytes: int) -> bytes:
        """The whole body.

        Raises:
            Problem: If it does not come in time.
            ConnectionError: If it does not come completely.
        """
        self.allow(self.body_seconds)
        try:
            body = self.rfile.read(n_bytes)
        except TimeoutError:
            raise Problem(
                f"The body did not come within {self.body_seconds:g} seconds.", status=408
            ) from None
        finally:
            self.connection.settimeout(self.write_seconds)
        if len(body) < n_bytes:
            raise ConnectionAbortedError("the body is incomplete")
        self._body_read = True
        return body

    def discard_body(self) -> None:
        """Reads on for a moment, so that a client that still sends receives the answer."""
        if not self._body_read and self.headers.get("Content-Length", "0") != "0":
            self.discard_rest()

    def discard_rest(self) -> None:
        """As :meth:`discard_body`, for a request without a sound head."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self._reader.n_left = math.inf
        self.allow(2.0)
        try:
            while self.rfile.read1(1 << 16):
                pass
        except (ConnectionError, TimeoutError):
            return

    def client_has_gone(self) -> bool:
        """Whether the client has closed the connection.

        One that only sends no more still reads. It is sent something, which a closed connection
        answers with an error by the next call.
        """
        self.connection.settimeout(0)
        try:
            if self.connection.recv(1, socket.MSG_PEEK):
                return False
            if self.status is None and self.request_version < "HTTP/1.1":
                return True  # it knows no interim answers
            if not self._asked_for_life:
                self._asked_for_life = True
                self.connection.send(_INTERIM if self.status is None else _COMMENT)
            return self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.write_seconds)
