"""Who may use the server: the rules for a request's names, origin, token and size.

On 127.0.0.1 there is no token, but the Host must be a name of this machine. Otherwise any web page
could reach the server if its own name resolves to this address (DNS rebinding). On a network every
request except the icon's and the manifest's needs the token too.
"""

import hmac
import ipaddress
import os
import re
import secrets
import socket
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from .api_errors import ApiError
from .server_options import is_loopback

COOKIE = "flashhead_token"
# An operating system fetches these without cookies to put a page on the Home Screen.
PUBLIC_PATHS = frozenset({"/manifest.webmanifest", "/apple-touch-icon.png"})
# A browser that opens one of these cannot send a header. Elsewhere the address must not carry the
# token, since browsers keep addresses in their histories.
QUERY_PATHS = frozenset({"/", "/manifest.webmanifest"})
MAX_HEAD_BYTES = 96 << 10

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
_TOKEN = re.compile(r"[0-9A-Za-z_-]{16,128}")  # unchanged in an address
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # that people do not mix up


@dataclass(frozen=True)
class Access:
    """The rules of a server."""

    token: str | None = None  # that clients send; None on 127.0.0.1, where they need none
    hosts: frozenset[str] = frozenset()  # further names of the server, in lower case
    origins: frozenset[str] = frozenset()  # of other sites whose scripts may use the API
    max_body_bytes: int = 4 << 20

    def check(self, scope: Scope) -> None:
        """Raises an ApiError unless a request may be served. h11 has rejected what is not HTTP."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        parts = [path, scope["query_string"], *(part for header in headers.raw for part in header)]
        if sum(map(len, parts)) > MAX_HEAD_BYTES:
            raise ApiError("The request's head is too long: send less.", status=431)

        host = headers.get("Host", "").strip()
        match = _HOST.fullmatch(host)
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

        if (origin := headers.get("Origin")) is not None:
            allowed = origin.lower() == f"http://{host}".lower() or origin in self.origins
        else:
            # a link on another site may lead here, but its scripts and images may not
            by_script = headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
            allowed = not by_script or headers.get("Sec-Fetch-Mode") == "navigate"
        if not allowed:
            remedy = "start it with --allowed-origins and the site's origin to allow one"
            raise ApiError(f"Scripts of other sites may not use this server: {remedy}.", status=403)

        preflight = method == "OPTIONS" and origin in self.origins
        public = method in ("GET", "HEAD") and path in PUBLIC_PATHS
        if self.token is not None and not (preflight or public or self.shown_token(scope)):
            needed = "the token that it printed at its start, as 'Authorization: Bearer TOKEN'"
            raise ApiError(f"This server needs {needed}.", status=401)

        length = headers.get("Content-Length")
        if "Transfer-Encoding" in headers or (method == "POST" and length is None):
            raise ApiError("A request with a body needs Content-Length.", status=411)
        if int(length or 0) > self.max_body_bytes:
            most = f"at most {self.max_body_bytes:,} are read"
            raise ApiError(f"The request has {length} bytes, and {most}: send less.", status=413)

    def shown_token(self, scope: Scope) -> str | None:
        """The server's token if the request carries it, else None. The comparison's time does not
        depend on the token."""
        if self.token is None:
            return None
        request, token = Request(scope), self.token.encode()
        sent = request.query_params.getlist("token") if scope["path"] in QUERY_PATHS else []
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        sent += [credentials] if scheme.lower() == "bearer" else []
        sent += [request.cookies.get(COOKIE, "")]
        equal = any(hmac.compare_digest(text.strip().encode(), token) for text in sent)
        return self.token if equal else None


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
    """The token in a file, which is made with one of 99 random bits that can be read aloud and
    typed. A page on a Home Screen so opens after a restart. ValueError if it holds no token."""
    path = path.expanduser()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words = ("".join(secrets.choice(_LETTERS) for _ in range(4)) for _ in range(5))
        with open(path, "x", opener=lambda name, how: os.open(name, how, 0o600)) as file:
            file.write("-".join(words) + "\n")
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _TOKEN.fullmatch(token):
        form = "16 to 128 letters, digits, '-' or '_'"
        raise ValueError(f"{path} does not hold a token ({form}): delete it for a new one.")
    return token
