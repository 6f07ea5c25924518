"""The front door: who may use the server, the errors of all requests, and the log.

On 127.0.0.1 there is no token, but the Host must be a name of this machine. Otherwise any web page
could reach the server if its own name resolves to this address (DNS rebinding). On a network every
request except the icon's and the manifest's needs the token too.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
import re
import secrets
import socket
import time
from argparse import Namespace
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_error import ApiError, dumps
from .connections import MAX_HEAD_BYTES, REFUSED_SECONDS, Connections
from .page_files import locked_page
from .server_options import is_loopback

COOKIE = "flashhead_token"
# No Secure, since the page is plain http. Strict keeps the cookie from other sites.
_COOKIE_SETTINGS = f"Path=/; Max-Age={365 * 24 * 3600}; HttpOnly; SameSite=Strict"
# An operating system fetches these without cookies to put a page on the Home Screen.
PUBLIC_PATHS = frozenset({"/manifest.webmanifest", "/apple-touch-icon.png"})
# A browser that opens one of these cannot send a header. Elsewhere the address must not carry the
# token, since browsers keep addresses in their histories.
QUERY_PATHS = frozenset({"/", "/manifest.webmanifest"})
BODY_SECONDS = 60.0
_CROSS_ORIGIN_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Vary": "Origin",
}

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
_TOKEN = re.compile(r"[0-9A-Za-z_-]{16,128}")  # unchanged in an address
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # letters and digits that people do not mix up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """The rules of a server."""

    token: str | None = None  # that clients send; None on 127.0.0.1, where they need none
    hosts: frozenset[str] = frozenset()  # further names of the server, in lower case
    origins: frozenset[str] = frozenset()  # of other sites whose scripts may use the API
    max_body_bytes: int = 4 << 20

    def check(self, scope: Scope) -> None:
        """Raises an ApiError unless a request may be served."""
        headers = Headers(scope=scope)
        n_bytes = sum(len(name) + len(value) for name, value in headers.raw)
        if n_bytes + len(scope["path"]) + len(scope["query_string"]) > MAX_HEAD_BYTES:
            raise ApiError("The request's head is too long: send less.", status=431)
        self._check_host(headers)
        self._check_origin(headers)
        self._check_token(scope, headers)
        self._check_body(scope, headers)

    def shown_token(self, scope: Scope) -> str | None:
        """The server's token if the request carries it, else None.

        The comparison's time does not depend on the token.
        """
        if self.token is None:
            return None
        headers = Headers(scope=scope)
        sent = _query_tokens(scope) if scope["path"] in QUERY_PATHS else []
        scheme, _, credentials = headers.get("Authorization", "").partition(" ")
        sent += [credentials] if scheme.lower() == "bearer" else []
        cookies = (part.strip().partition("=") for part in headers.get("Cookie", "").split(";"))
        sent += [value for name, _, value in cookies if name == COOKIE]
        token = self.token.encode()
        equal = any(hmac.compare_digest(text.strip().encode(), token) for text in sent)
        return self.token if equal else None

    def cross_origin(self, headers: Headers) -> str | None:
        """The request's Origin if it is an allowed site, else None."""
        origin = headers.get("Origin")
        return origin if origin in self.origins else None

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("Host")
        if len(hosts) != 1:
            raise ApiError("A request needs one Host header.")
        match = _HOST.fullmatch(hosts[0].strip())
        name = (match[1] or match[2]).lower().rstrip(".") if match else ""
        known = name == "localhost" or name in self.hosts
        try:
            # a page from an address has that address as its origin, so nothing was rebound
            known |= ipaddress.ip_address(name).is_loopback or self.token is not None
        except ValueError:
            # machines of the network answer for names in .local, and the DNS does not
            known |= self.token is not None and name.endswith(".local")
        if match is None or not known:
            remedy = "use its address, or start it with --allowed-hosts and the name"
            raise ApiError(f"This server does not go by that name: {remedy}.", status=403)

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("Origin")
        if origin is not None:
            page = f"http://{headers['Host'].strip()}".lower()
            allowed = origin.lower() == page or origin in self.origins
        else:
            # a link on another site may lead here, but its scripts and images may not
            by_script = headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
            allowed = not by_script or headers.get("Sec-Fetch-Mode") == "navigate"
        if not allowed:
            remedy = "start it with --allowed-origins and the site's origin to allow one"
            raise ApiError(f"Scripts of other sites may not use this server: {remedy}.", status=403)

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        preflight = scope["method"] == "OPTIONS" and self.cross_origin(headers) is not None
        public = scope["method"] in ("GET", "HEAD") and scope["path"] in PUBLIC_PATHS
        if self.token is not None and not (preflight or public or self.shown_token(scope)):
            needed = "the token that it printed at its start, as 'Authorization: Bearer TOKEN'"
            raise ApiError(f"This server needs {needed}.", status=401)

    def _check_body(self, scope: Scope, headers: Headers) -> None:
        lengths = headers.getlist("Content-Length")
        if "Transfer-Encoding" in headers or (scope["method"] == "POST" and not lengths):
            raise ApiError("A request with a body needs Content-Length.", status=411)
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,15}", length) for length in lengths):
            raise ApiError("Content-Length must be one whole number.")
        if lengths and (n_bytes := int(lengths[0])) > self.max_body_bytes:
            most = f"at most {self.max_body_bytes:,} are read"
            raise ApiError(f"The request has {n_bytes:,} bytes, and {most}: send less.", status=413)


def access_of(args: Namespace) -> Access:
    """The rules for clients that the server's flags set."""
    hosts = frozenset(name.strip().lower().rstrip(".") for name in args.allowed_hosts)
    token = None
    if not is_loopback(args.host):
        token = kept_token(args.token_file)
        # names by which other machines may call this one
        name = socket.gethostname().lower().rstrip(".")
        hosts |= {args.host.lower(), name, name.partition(".")[0]} - {""}
    return Access(token, hosts, frozenset(args.allowed_origins), args.max_body_bytes)


def kept_token(path: Path) -> str:
    """The token in a file, so that a page on a Home Screen still opens after a restart.

    A missing file is made with a random one of 99 bits that can be read aloud and typed. A
    ValueError if the file does not hold a token.
    """
    path = path.expanduser()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(5))
        with open(path, "x", opener=lambda name, how: os.open(name, how, 0o600)) as file:
            file.write("-".join(words) + "\n")
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _TOKEN.fullmatch(token):
        form = "16 to 128 letters, digits, '-' or '_'"
        remedy = "delete it, and a new one is made"
        raise ValueError(f"{path} does not hold a token ({form}): {remedy}.")
    return token


class FrontDoor:
    """An application behind the rules of access: it answers errors, and logs requests.

    A request finds it as ``request.app``. What an endpoint adds to ``request.state.notes`` is
    logged.
    """

    def __init__(self, app: ASGIApp, access: Access, connections: Connections):
        self._app, self.access, self._connections = app, access, connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes: list[str] = []
        scope["state"]["notes"] = notes
        scope["app"] = self  # the router raises its 404 and 405 then
        exchange = _Exchange(self.access, scope, receive, send)
        began, response = time.monotonic(), None
        try:
            response = await self._answer(scope, exchange)
            if response is not None:
                await response(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            notes.append("the client has left")
        if notes or (response is not None and exchange.status >= 400):
            line = " ".join((scope["client"][0], scope["method"], self._loggable(scope["path"])))
            parts = [f"{exchange.status or '-'}", f"{time.monotonic() - began:.2f} s", *notes]
            logger.info("%s %s", line, ", ".join(parts))

    async def _answer(self, scope: Scope, exchange: "_Exchange") -> ASGIApp | None:
        """Lets the application answer. Returns an error's response."""
        try:
            self.access.check(scope)
            if scope["method"] == "OPTIONS":  # which requests a script of another site may send
                return Response(status_code=204)
            limits = self._connections.answering(scope)
            with limits if scope["method"] == "POST" else nullcontext():
                await self._app(scope, exchange.receive, exchange.send)
            return None
        except ClientDisconnect:
            raise
        except ApiError as error:
            problem = error
        except HTTPException as error:
            text = f"There is nothing at {scope['path'][:200]}."
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                text = f"{scope['method'][:20]} is not for this path: see docs/server.md."
            problem = ApiError(text, status=error.status_code)
        except Exception:
            logger.exception("A request could not be answered")
            problem = ApiError("The server has failed: see its log.", status=500)
        if exchange.status:
            return None  # too late: the connection ends amid the answer
        if problem.status == 401 and scope["method"] == "GET" and scope["path"] == "/":
            return locked_page(wrong=bool(_query_tokens(scope)))
        return json_response(problem.as_json(), problem.status)

    def _loggable(self, path: str) -> str:
        """A path for the log: without the token, in whatever case, and on one line."""
        if self.access.token is not None:
            path = re.sub(re.escape(self.access.token), "…", path, flags=re.IGNORECASE)
        return path.encode("unicode_escape").decode().replace("\\u2026", "…")[:200]


class _Exchange:
    """The messages of a request and its response: what was sent, and what has been received."""

    def __init__(self, access: Access, scope: Scope, receive: Receive, send: Send):
        self.status = 0  # of the response, once it has begun
        self._access, self._scope, self._receive, self._send = access, scope, receive, send
        self._received = Headers(scope=scope).get("Content-Length", "0") == "0"

    async def receive(self) -> Message:
        message = await self._receive()
        self._received |= not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(MutableHeaders(scope=message))
        elif not self._received and not message.get("more_body", False):
            # a connection that is closed while its client still sends would lose the response
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_SECONDS):
                    while not self._received:
                        await self.receive()
            message = {"type": "http.response.body"}
        await self._send(message)

    def _add_headers(self, headers: MutableHeaders) -> None:
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["Retry-After"] = "2"
        if self._scope["path"] == "/" and (token := self._access.shown_token(self._scope)):
            headers["Set-Cookie"] = f"{COOKIE}={token}; {_COOKIE_SETTINGS}"
        if (origin := self._access.cross_origin(Headers(scope=self._scope))) is not None:
            headers.update({"Access-Control-Allow-Origin": origin, **_CROSS_ORIGIN_HEADERS})


async def read_body(request: Request) -> bytes:
    """The whole body; an ApiError if it does not come in time."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        limit = f"within {BODY_SECONDS:g} seconds"
        raise ApiError(f"The body did not come {limit}.", status=408) from None


def json_response(value: Any, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(dumps(value), status, headers, media_type="application/json")


def _query_tokens(scope: Scope) -> list[str]:
    return parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
