"""Connections: their number, and the time that a client has for its request."""

import io
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from http.server import ThreadingHTTPServer
from threading import Lock

from ..protocol.api_error import ApiError
from .access import Access

# Connections whose request is not read yet. Beyond this, the address with most loses its oldest.
MAX_UNREAD = 64
# Requests in progress, in total and for one address.
MAX_ANSWERED = 128
MAX_ANSWERED_PER_ADDRESS = 32
# Bytes of a request line and headers, of which the line alone may have 64 KiB.
MAX_HEAD_BYTES = 96 << 10


class LimitedServer(ThreadingHTTPServer):
    """A thread for each connection, with limits on unread and on answered ones.

    A connection counts as unread until its handler calls :meth:`answering`. An unread connection
    never waits, so a request that needs no computing is always answered.
    """

    access: Access  # is set before it serves
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
                (address, _), *_ = Counter(self._unread.values()).most_common(1)
                oldest = next(c for c, of in self._unread.items() if of == address)
                del self._unread[oldest]
                with suppress(OSError):  # it may be closed already
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it
            self._unread[request] = client_address[0]
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._unread.pop(request, None)

    @contextmanager
    def answering(self, connection: socket.socket, address: str) -> Iterator[None]:
        """A block in which a request is answered; an ApiError if there are too many."""
        with self._lock:
            if self._answered[address] >= (most := MAX_ANSWERED_PER_ADDRESS):
                answered = f"{most} requests of your address are being answered"
                raise ApiError(f"{answered}: wait for one of them to end.", status=429)
            if self._answered.total() >= MAX_ANSWERED:
                raise ApiError("Too many requests at once: try again in a moment.", status=503)
            self._unread.pop(connection, None)
            self._answered[address] += 1
        try:
            yield
        finally:
            with self._lock:
                self._answered -= Counter([address])  # drops counts of 0


class TimedReader(io.RawIOBase):
    """Reads from a connection until a deadline, which may be moved."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._deadline = 0.0
        self.n_left: float = MAX_HEAD_BYTES  # that may be read

    def allow(self, seconds: float) -> None:
        """Gives the client ``seconds`` from now on."""
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if self.n_left <= 0:
            raise HTTPException(f"a head has at most {MAX_HEAD_BYTES:,} bytes")
        self._connection.settimeout(left)
        n_read = self._connection.recv_into(buffer)
        self.n_left -= n_read
        return n_read
