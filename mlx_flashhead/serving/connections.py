"""The front door: limits of connections and of time, errors of all requests, and the log.

uvicorn waits for ever for a request's head and for a client that reads nothing, so its protocol has
timers here. A connection carries one request: uvicorn stops reading when more bytes follow it, and
would then not see that the client has left.
"""

import asyncio
import logging
import re
import sys
import time
from asyncio import Transport
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .access import COOKIE, MAX_HEAD_BYTES, Access
from .api_errors import ApiError
from .bodies import json_response
from .page_files import locked_page

# Connections that wait. Beyond it, the address with most of them loses its oldest.
MAX_WAITING = 64
# Requests in progress, in total and for one address.
MAX_ANSWERED = 128
MAX_ANSWERED_PER_ADDRESS = 32
# For a request's head and its body, and for a client that does not read.
HEAD_SECONDS = 10.0
BODY_SECONDS = 60.0
WRITE_SECONDS = 30.0
# A rejected client that still sends may read why. One that has finished gets what is ready by then.
REFUSED_SECONDS = 2.0
HALF_CLOSED_SECONDS = 0.2
# Those that scripts of allowed sites may send.
ALLOWED_HEADERS = "Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta"
# No Secure, since the page is plain http. Strict keeps the cookie from other sites.
_COOKIE_SETTINGS = f"Path=/; Max-Age={365 * 24 * 3600}; HttpOnly; SameSite=Strict"
# What a client is told that asks for another path.
_SERVED = (
    "the page is at /, chats go to /v1/chat/completions, /v1/messages or /v1/responses, texts to "
    "/v1/completions, and /v1/models lists the models"
)


logger = logging.getLogger(__name__)

# Connections without a request that is being answered, by both ends' addresses, the oldest first.
Waiting = dict[Any, "Connection"]


class Connection(H11Protocol):
    """A connection of uvicorn's, with deadlines."""

    def __init__(self, waiting: Waiting, **options: Any):
        super().__init__(**options)
        self._waiting = waiting
        self._refused = False
        # The number of bytes after the request.
        self._n_ignored = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Admits a new connection to the waiting ones, and aborts the oldest if there are too many.

        The oldest is one of the address that has most of them.
        """
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, transport.abort)
        self._ends = (self.client, self.server)
        if self.client is None:
            # The client has gone already.
            self._refused = True
            transport.abort()
            return
        if len(self._waiting) >= MAX_WAITING:
            n_of_address = Counter(client[0] for client, _ in self._waiting)
            address, _ = n_of_address.most_common(1)[0]
            oldest = next(ends for ends in self._waiting if ends[0][0] == address)
            self._waiting.pop(oldest).transport.abort()
        self._waiting[self._ends] = self

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection and its timer."""
        self._waiting.pop(self._ends, None)
        self._timer.cancel()
        super().connection_lost(exc)

    @property
    def _complete(self) -> bool:
        """Whether the request has been received."""
        return self.cycle is not None and not self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """Reads the request, and ignores what comes after it, up to a limit."""
        if self._complete:
            self._n_ignored += len(data)
            if self._n_ignored > MAX_HEAD_BYTES:
                self.transport.abort()
        elif not self._refused:
            begun = self.cycle is not None
            super().data_received(data)
            if self.cycle is not None and not begun:
                self._timer.cancel()
            if self._complete:
                # The end of the connection is noticed while it is being read.
                self.flow.resume_reading()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Leaves a complete request some time for its answer when the client has ended its side."""
        if not self._complete:
            return None
        self.loop.call_later(HALF_CLOSED_SECONDS, self.transport.close)
        return True

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP with an error like all others."""
        if self.cycle is not None:
            self.transport.abort()
            return
        status = HTTPStatus(getattr(sys.exception(), "error_status_hint", 400))
        text = "The request is not HTTP/1.1."
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            text = f"The request's head has more than {MAX_HEAD_BYTES:,} bytes: send less."
        response = json_response(ApiError(text, status=status).as_json(), status)
        headers = [b"%b: %b" % header for header in response.raw_headers]
        lines = [f"HTTP/1.1 {status} {status.phrase}".encode(), *headers, b"Connection: close"]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self._refused = True
        # The client may have gone.
        with suppress(OSError):
            self.transport.write_eof()
        self.loop.call_later(REFUSED_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        """Allows the client some time to read the response."""
        super().on_response_complete()
        if not self.transport.is_closing():
            # It waits again, until the client has read the response.
            self._waiting[self._ends] = self
        self._allow_for_reading()

    def pause_writing(self) -> None:
        """Begins the time in which the client must read."""
        super().pause_writing()
        self._allow_for_reading()

    def resume_writing(self) -> None:
        """Ends the time in which the client must read."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._timer.cancel()

    def _allow_for_reading(self) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)


class FrontDoor:
    """An application behind the rules of access, its `access`.

    It answers errors, and logs requests with what the application adds to ``request.state.notes``.
    """

    def __init__(self, app: ASGIApp, access: Access, waiting: Waiting):
        self._app = app
        self.access = access
        self._waiting = waiting
        # The number of an address's requests that are being answered.
        self._answered: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request by the application, if the rules of access admit it."""
        # With an application the router raises its 404 and 405.
        scope["app"] = self
        exchange = _Exchange(self, scope, receive, send)
        scope["state"]["notes"] = exchange.notes
        problem: ApiError | None = None
        try:
            self.access.check(scope)
            app = self._app
            if scope["method"] == "OPTIONS":
                # The headers say which requests a script of another site may send.
                app = Response(status_code=204)
            if scope["method"] == "POST":
                self._check_room(scope["client"][0])
            await app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.notes.append("the client has left")
        except Exception as error:
            problem = _problem_of(error, scope)
        finally:
            if scope["state"].get("is_counted"):
                # Counts of 0 leave the counter.
                self._answered -= Counter([scope["client"][0]])
        # An error amid an answer ends the connection.
        if problem is not None and not exchange.status:
            response = _error_response(problem, scope)
            await response(scope, exchange.receive, exchange.send)
        if exchange.notes or problem is not None:
            self._log(scope, exchange)

    def _log(self, scope: Scope, exchange: "_Exchange") -> None:
        path = scope["path"]
        if self.access.token is not None:
            # The token may be written in any case.
            path = re.sub(re.escape(self.access.token), "…", path, flags=re.IGNORECASE)
        path = path.encode("unicode_escape").decode().replace("\\u2026", "…")[:200]
        status = str(exchange.status or "-")
        seconds = f"{time.monotonic() - exchange.began:.2f} s"
        notes = ", ".join([status, seconds, *exchange.notes])
        logger.info("%s %s %s %s", scope["client"][0], scope["method"][:20], path, notes)

    def _check_room(self, address: str) -> None:
        """Raises an ApiError if too many requests are being answered."""
        if self._answered[address] >= MAX_ANSWERED_PER_ADDRESS:
            raise ApiError(
                f"{MAX_ANSWERED_PER_ADDRESS} requests of your address are being answered: wait "
                "for one of them to end.",
                status=429,
            )
        if self._answered.total() >= MAX_ANSWERED:
            raise ApiError("Too many requests at once: try again in a moment.", status=503)

    def admit(self, scope: Scope) -> None:
        """Counts a request that has arrived, for its address.

        Until then its connection is one of those that wait, so a body that never comes keeps nobody
        out.
        """
        address = scope["client"][0]
        self._check_room(address)
        self._waiting.pop((scope["client"], scope["server"]), None)
        self._answered[address] += 1
        scope["state"]["is_counted"] = True

    def add_headers(self, headers: MutableHeaders, status: int, scope: Scope) -> None:
        """Adds what the rules of access say to a response's headers."""
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            headers["Retry-After"] = "2"
        if scope["path"] == "/":
            token = self.access.shown_token(scope)
            if token is not None:
                headers["Set-Cookie"] = f"{COOKIE}={token}; {_COOKIE_SETTINGS}"
        origin = Headers(scope=scope).get("Origin", "")
        if origin in self.access.origins:
            headers.update(
                {
                    "Access-Control-Allow-Origin": origin,
                    "Vary": "Origin",
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": ALLOWED_HEADERS,
                }
            )


@dataclass
class _Exchange:
    """A request and its response, on their way through the front door.

    Attributes:
        door: The front door.
        scope: The request's.
        source: Where the request comes from.
        sink: Where the response goes to.
        notes: What the application says of it, for the log.
        began: When it began, by ``time.monotonic``.
        status: That of the response; 0 until it begins.
        received: Whether the whole request has been received.
    """

    door: FrontDoor
    scope: Scope
    source: Receive
    sink: Send
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    received: bool = False

    async def receive(self) -> Message:
        """Receives a part of the request."""
        message = await self.source()
        self.received |= not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Sends a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.door.add_headers(MutableHeaders(scope=message), self.status, self.scope)
        elif not self.received and not message.get("more_body", False):
            # A connection that is closed while its client still sends would lose the response.
            await self.sink({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_SECONDS):
                    while not self.received:
                        await self.receive()
            message = {"type": "http.response.body"}
        await self.sink(message)


def _error_response(problem: ApiError, scope: Scope) -> Response:
    """The response to a request that is refused; the page asks for the token, if that is why."""
    is_page = scope["method"] == "GET" and scope["path"] == "/"
    if problem.status == HTTPStatus.UNAUTHORIZED and is_page:
        return locked_page(wrong="token" in Request(scope).query_params)
    return json_response(problem.body_at(scope["path"]), problem.status)


def _problem_of(error: Exception, scope: Scope) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, HTTPException):
        logger.error("A request could not be answered", exc_info=error)
        return ApiError("The server has failed: see its log.", status=500)
    path = scope["path"][:200]
    text = f"There is nothing at {path}: {_SERVED}."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and error.headers:
        allowed = sorted(error.headers["Allow"].split(", "))
        text = f"{scope['method'][:20]} is not for {path}, which takes {' and '.join(allowed)}."
    return ApiError(text, status=error.status_code)


async def read_body(request: Request) -> bytes:
    """Returns the whole body. The request is one of those that are being answered from then on.

    Raises:
        ApiError: If it does not come in time, or too many are being answered.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.body()
    except TimeoutError:
        text = f"The body did not come within {BODY_SECONDS:g} seconds."
        raise ApiError(text, status=408) from None
    request.app.admit(request.scope)
    return body
