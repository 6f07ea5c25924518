"""The front door: checks every request, then serves the page or passes it to the API."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from email.message import Message
from http import HTTPStatus
from typing import Any

from ..protocol.errors import Problem
from ..protocol.valid_json import dumps
from .access import COOKIE, Access, given_tokens, path_of, query_token, without_token
from .connections import TimedHandler
from .page_files import PageFile, locked_page, page_file

INFO_PATH = "/page/info.json"
HEALTH_PATH = "/health"
_COOKIE_SECONDS = 365 * 24 * 3600

logger = logging.getLogger(__name__)


class GuardedHandler(TimedHandler, ABC):
    """Serves the page and ``/health``; a subclass serves the rest."""

    def setup(self) -> None:
        """Prepares for a request."""
        super().setup()
        self._notes: list[str] = []
        # the base class does not set these if a request is not HTTP
        self.path, self.headers = "", Message()

    @property
    @abstractmethod
    def access(self) -> Access:
        """The server's rules."""

    @abstractmethod
    def page_info(self) -> Mapping[str, Any]:
        """What the page needs to know: the models, the default first, and the settings."""

    @abstractmethod
    def health_info(self) -> Mapping[str, Any]:
        """What ``/health`` tells beside whether requests are answered."""

    @abstractmethod
    def healthy(self) -> bool:
        """Whether requests are answered."""

    @abstractmethod
    def get(self, path: str) -> None:
        """Answers a request without a body.

        Raises:
            Problem: If it cannot be answered.
        """

    @abstractmethod
    def post(self, path: str) -> None:
        """Answers a request with a body, which has not been read yet.

        Raises:
            Problem: If it cannot be answered.
        """

    def handle(self) -> None:
        """Serves the connection's one request, and logs it."""
        began = time.monotonic()
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.note("the client has gone")
        if self.status is not None or self._notes:
            self._log(time.monotonic() - began)

    def parse_request(self) -> bool:
        """Reads a request's head. False if it is answered already, with a refusal for example."""
        if not super().parse_request():
            return False
        self.connection.settimeout(self.write_seconds)
        try:
            self.access.check(self.command, self.path, self.headers)
        except Problem as problem:
            self._refuse(problem)
            return False
        return True

    def do_GET(self) -> None:
        """Answers with a file of the page, or passes the request to the API."""
        path = path_of(self.path)
        if path == HEALTH_PATH:
            healthy = self.healthy()
            status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
            report = {"status": "ok" if healthy else "unavailable", **self.health_info()}
            self.send_json(report, status)
        elif path == INFO_PATH:
            self.send_json(self.page_info())
        elif (file := page_file(self.path, self._shown_token())) is not None:
            self._send(HTTPStatus.OK, file)
        else:
            self._answer(self.get)

    do_HEAD = do_GET  # without the body, see _send

    def do_POST(self) -> None:
        """Passes the request to the API."""
        self._answer(self.post)

    def do_OPTIONS(self) -> None:
        """Tells a browser which requests another site's script may send."""
        self._send(HTTPStatus.NO_CONTENT, PageFile(b"", {}))

    def note(self, text: str) -> None:
        """Adds to the request's line in the log."""
        self._notes.append(text)

    def send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        """Answers with JSON."""
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        headers |= {"Content-Type": "application/json", "Cache-Control": "no-store"}
        self._send(status, PageFile(dumps(value).encode(), headers))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replaces the base class's HTML page for requests that are not HTTP."""
        self.close_connection = True
        self.request_version = "HTTP/1.0"  # so that the answer gets a head
        reason = message or HTTPStatus(code).phrase
        self.send_json(Problem(f"{reason}.", status=code).as_json(), HTTPStatus(code))
        if code == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self.discard_rest()

    def end_headers(self) -> None:
        """As the base class's, with the headers for scripts of allowed sites."""
        origin = self.access.cross_origin(self.headers)
        if origin is not None:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Vary", "Origin")
        super().end_headers()

    def log_message(self, format: str, *args) -> None:  # the base class's names
        """Does nothing, since a request is logged once, at its end."""

    def _answer(self, answer: Callable[[str], None]) -> None:
        try:
            answer(path_of(self.path))
        except Problem as problem:
            self._refuse(problem)
        except (ConnectionError, TimeoutError):
            self.note("the client has gone")
        except Exception:
            logger.exception("A request could not be answered")
            if self.status is None:
                self._refuse(Problem("The server has failed: see its log.", status=500))

    def _shown_token(self) -> str | None:
        """The server's token if this request carries it. Public files need none."""
        token = self.access.token
        shown = token and any(map(self.access.accepts, given_tokens(self.path, self.headers)))
        return token if shown else None

    def _send(self, status: HTTPStatus, file: PageFile) -> None:
        self.send_response(status)
        for name, value in file.headers.items():
            self.send_header(name, value)
        if path_of(self.path) == "/" and (token := self._shown_token()):
            # No Secure, since the page is plain http. Strict keeps the cookie from other sites.
            self.send_header(
                "Set-Cookie",
                f"{COOKIE}={token}; Path=/; Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Strict",
            )
        self.send_header("Content-Length", str(len(file.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(file.content)

    def _refuse(self, problem: Problem) -> None:
        self.close_connection = True
        unknown = problem.status == HTTPStatus.UNAUTHORIZED
        if unknown and self.command == "GET" and path_of(self.path) == "/":
            self._send(problem.status, locked_page(wrong=query_token(self.path) is not None))
            return
        headers = {}
        if unknown:
            headers["WWW_Authenticate"] = "Bearer"
        if problem.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            headers["Retry_After"] = "2"
        self.send_json(problem.as_json(), problem.status, **headers)
        self.discard_body()

    def _log(self, seconds: float) -> None:
        line = without_token(self.requestline.encode("unicode_escape").decode())[:200]
        status = "-" if self.status is None else int(self.status)
        notes = ", ".join([f"{seconds:.2f} s", *self._notes])
        logger.info("%s %s %s %s", self.client_address[0], line, status, notes)
