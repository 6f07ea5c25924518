"""The front door: checks every request, then serves the page or passes it to the API."""

import io
import logging
import math
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from ..protocol.api_error import ApiError, dumps
from .access import COOKIE, path_of, query_tokens, without_token
from .connections import LimitedServer, TimedReader
from .page_files import PageFile, locked_page, page_file

# No Secure, since the page is plain http. Strict keeps the cookie from other sites.
_COOKIE_SETTINGS = f"Path=/; Max-Age={365 * 24 * 3600}; HttpOnly; SameSite=Strict"
# Sent to a client that sends no more: an interim answer, or a comment of a stream.
_INTERIM, _COMMENT = b"HTTP/1.1 100 Continue\r\n\r\n", b": \n\n"

logger = logging.getLogger(__name__)


class GuardedHandler(BaseHTTPRequestHandler):
    """Serves the page; a subclass serves the rest."""

    get: Callable[[str], None]  # answers by the path, or raises an ApiError
    post: Callable[[str], None]  # the same with a body, which has not been read yet
    server: LimitedServer
    raw_requestline: bytes
    server_version, sys_version = "mlx_flashhead", ""  # without versions
    # Deadlines: of a request's head, of its body, and of a client that does not read.
    head_seconds, body_seconds, write_seconds = 10.0, 60.0, 30.0

    def setup(self) -> None:
        super().setup()
        self.status: HTTPStatus | None = None  # of the answer, as soon as it has begun
        self._body_read = self._asked_for_life = False
        self._notes: list[str] = []
        # the base class does not set these if a request is not HTTP
        self.path, self.headers = "", Message()
        self._reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)
        self._reader.allow(self.head_seconds)

    def handle(self) -> None:
        """Serves the connection's one request, and logs it."""
        began = time.monotonic()
        try:
            super().handle()
        except ConnectionError:
            self.note("the client has gone")
        if self.status is not None or self._notes:
            line = without_token(self.requestline.encode("unicode_escape").decode())[:200]
            status = "-" if self.status is None else int(self.status)
            notes = ", ".join([f"{time.monotonic() - began:.2f} s", *self._notes])
            logger.info("%s %s %s %s", self.client_address[0], line, status, notes)

    def parse_request(self) -> bool:
        """Reads a request's head. False if it is answered already, with a refusal for example."""
        if self.raw_requestline == b"\r\n":  # left over from a body before, by some clients
            self.raw_requestline = self.rfile.readline((64 << 10) + 1)
        head_read = super().parse_request()
        self._reader.n_left = math.inf
        if not head_read:
            return False
        self.connection.settimeout(self.write_seconds)
        try:
            self.server.access.check(self.command, self.path, self.headers)
        except ApiError as problem:
            self._refuse(problem)
            return False
        return True

    def do_GET(self) -> None:
        """Answers with a file of the page, or passes the request to the API."""
        file = page_file(self.path, self._shown_token())
        if file is None:
            self._answer(self.get)
        else:
            self._send(HTTPStatus.OK, file)

    do_HEAD = do_GET  # without the body, see _send

    def do_POST(self) -> None:
        self._answer(self.post)

    def do_OPTIONS(self) -> None:
        """Tells a browser which requests another site's script may send."""
        self._send(204, (b"", {}))

    def read_body(self) -> bytes:
        """The whole body; an ApiError if it does not come in time."""
        n_bytes = int(self.headers["Content-Length"])
        self._reader.allow(self.body_seconds)
        try:
            body = self.rfile.read(n_bytes)
        except TimeoutError:
            limit = f"within {self.body_seconds:g} seconds"
            raise ApiError(f"The body did not come {limit}.", status=408) from None
        finally:
            self.connection.settimeout(self.write_seconds)
        if len(body) < n_bytes:
            raise ConnectionAbortedError("the body is incomplete")
        self._body_read = True
        return body

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

    def note(self, text: str) -> None:
        """Adds to the request's line in the log."""
        self._notes.append(text)

    def send_json(self, value: Any, status: int = 200) -> None:
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (429, 503):
            headers["Retry-After"] = "2"
        self._send(status, (dumps(value).encode(), headers))

    def send_response(self, code: int, message: str | None = None) -> None:
        self.status = HTTPStatus(code)
        super().send_response(code, message)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replaces the base class's HTML page for requests that are not HTTP."""
        self.close_connection = True
        self.request_version = "HTTP/1.0"  # so that the answer gets a head
        reason = message or HTTPStatus(code).phrase
        self.send_json(ApiError(f"{reason}.", status=code).as_json(), code)
        if code == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self._discard_rest()

    def end_headers(self) -> None:
        """As the base class's, with the headers for scripts of allowed sites."""
        origin = self.server.access.cross_origin(self.headers)
        if origin is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Vary", "Origin")
        super().end_headers()

    def log_message(self, format: str, *args) -> None:
        """Nothing: a request is logged once, at its end."""

    def _answer(self, answer: Callable[[str], None]) -> None:
        try:
            answer(path_of(self.path))
        except ApiError as problem:
            self._refuse(problem)
        except (ConnectionError, TimeoutError):
            self.note("the client has gone")
        except Exception:
            logger.exception("A request could not be answered")
            if self.status is None:
                self._refuse(ApiError("The server has failed: see its log.", status=500))

    def _shown_token(self) -> str | None:
        """The server's token if this request carries it."""
        access = self.server.access
        return access.token if access.accepts(self.path, self.headers) else None

    def _send(self, status: int, file: PageFile) -> None:
        content, headers = file
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if path_of(self.path) == "/" and (token := self._shown_token()):
            self.send_header("Set-Cookie", f"{COOKIE}={token}; {_COOKIE_SETTINGS}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, problem: ApiError) -> None:
        self.close_connection = True
        if problem.status == 401 and self.command == "GET" and path_of(self.path) == "/":
            self._send(problem.status, locked_page(wrong=bool(query_tokens(self.path))))
            return
        self.send_json(problem.as_json(), problem.status)
        if not self._body_read and self.headers.get("Content-Length", "0") != "0":
            self._discard_rest()

    def _discard_rest(self) -> None:
        """Reads on for a moment, so that a client that still sends receives the answer."""
        self._reader.n_left = math.inf
        self._reader.allow(2.0)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(1 << 16):
                pass
