"""The front door: every request is checked first, then it gets the page or reaches the API."""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_WR
from threading import BoundedSemaphore
from typing import Any

from .access import COOKIE, Access, Refusal, given_tokens, path_of, query_token, without_token
from .page_files import PageFile, locked_page, page_file

MAX_CONNECTIONS = 128
IDLE_SECONDS = 30
INFO_PATH = "/page/info.json"
_COOKIE_SECONDS = 365 * 24 * 3600
# Of a refused body so much is read and dropped, so that the client gets to read why.
_DISCARDED_BYTES = 32 << 20
_BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\n\r\n"
    b'{"error": "Too many connections at once: try again in a moment."}'
)


class GuardedHandler(BaseHTTPRequestHandler, ABC):
    """Goes before the handler of an API in a class's bases.

    A subclass gives `access` and `page_info`.
    """

    timeout = IDLE_SECONDS  # of silence on a connection, in either direction

    @property
    @abstractmethod
    def access(self) -> Access:
        """The server's rules."""

    @abstractmethod
    def page_info(self) -> Mapping[str, Any]:
        """What the page shows and takes for its defaults: the model's name and the settings."""

    def parse_request(self) -> bool:
        """Reads a request's head; False if it has been answered, with a refusal for example."""
        if not super().parse_request():
            return False
        refusal = self.access.refusal(self.command, self.path, self.headers)
        if refusal is None:
            return True
        self._refuse(refusal)
        return False

    def log_message(self, format: str, *args) -> None:  # the base class's names
        super().log_message("%s", without_token(format % args))

    def do_GET(self) -> None:
        """Answers with a file of the page, or lets the API answer."""
        if path_of(self.path) == INFO_PATH:
            content = json.dumps(self.page_info()).encode()
            headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
            self._send(HTTPStatus.OK, PageFile(content, headers))
            return
        file = page_file(self.path, self._shown_token())
        if file is None:
            super().do_GET()
        else:
            self._send(HTTPStatus.OK, file)

    def _shown_token(self) -> str | None:
        """The server's token if this request carries it; a public file is asked for without."""
        token = self.access.token
        shown = token and any(map(self.access.accepts, given_tokens(self.path, self.headers)))
        return token if shown else None

    def _send(self, status: HTTPStatus, file: PageFile) -> None:
        self.send_response(status)
        for name, value in file.headers.items():
            self.send_header(name, value)
        if path_of(self.path) == "/" and (token := self._shown_token()):
            # A page on plain http: no Secure. Strict: no other site makes a browser send it.
            self.send_header(
                "Set-Cookie",
                f"{COOKIE}={token}; Path=/; Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Strict",
            )
        self.send_header("Content-Length", str(len(file.content)))
        self.end_headers()
        self.wfile.write(file.content)

    def _refuse(self, refusal: Refusal) -> None:
        self.close_connection = True
        unknown = refusal.status == HTTPStatus.UNAUTHORIZED
        if unknown and self.command == "GET" and path_of(self.path) == "/":
            self._send(refusal.status, locked_page(wrong=query_token(self.path) is not None))
            return
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        if unknown:
            headers["WWW-Authenticate"] = "Bearer"
        self._send(
            refusal.status, PageFile(json.dumps({"error": refusal.reason}).encode(), headers)
        )
        self._discard_body()

    def _discard_body(self) -> None:
        """Closing on a client that still writes would throw away the answer it has not read."""
        self.wfile.flush()
        self.connection.shutdown(SHUT_WR)
        left = _DISCARDED_BYTES
        if self.headers.get("Content-Length", "0") == "0":
            return
        self.connection.settimeout(2)
        try:
            while left > 0 and (chunk := self.rfile.read1(1 << 16)):
                left -= len(chunk)
        except (ConnectionError, TimeoutError):
            return


class BoundedServer(ThreadingHTTPServer):
    """A thread for each connection, and no more than `MAX_CONNECTIONS` of them."""

    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS  # several clients may come at once

    def __init__(self, *args, **kwargs):
        self._free = BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request, client_address) -> None:
        """Starts the connection's thread, or turns it away."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.sendall(_BUSY)
        except OSError:
            pass
        finally:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        """Serves one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address) -> None:
        """A client that has gone, as after *stop*, is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
