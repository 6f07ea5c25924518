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
from .server_options import DEFAULT_TOKEN_FILE, is_loopback

COOKIE = "flashhead_token"
# An operating system fetches these without cookies to put a page on the Home Screen.
PUBLIC_PATHS = frozenset({"/manifest.webmanifest", "/apple-touch-icon.png"})
# A browser that opens one of these cannot send a header. Elsewhere the address must not carry the
# token, since browsers keep addresses in their histories.
QUERY_PATHS = frozenset({"/", "/manifest.webmanifest"})
MAX_HEAD_BYTES = 96 << 10

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
_HTTPS_ORIGIN = re.compile(r"https://([a-z0-9_.-]+)(:[0-9]{1,5})?")
# A token of these characters stands unchanged in an address.
_TOKEN = re.compile(r"[0-9A-Za-z_-]{16,128}")
# People do not mix up these letters, each of which has 5 random bits.
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"


@dataclass(frozen=True)
class Access:
    """The rules of a server.

    Attributes:
        token: What clients send; None on 127.0.0.1, where they need none.
        hosts: Further names of the server, in lower case.
        origins: Other sites whose scripts may use the API.
        max_body_bytes: Bytes of the largest body that is read.
        proxied: Those of ``hosts`` that may be a proxy's, which answers by https.
    """

    token: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    max_body_bytes: int = 4 << 20
    proxied: frozenset[str] = frozenset()

    def check(self, scope: Scope) -> None:
        """Checks that a request may be served. h11 has rejected what is not HTTP.

        Raises:
            ApiError: If it may not.
        """
        headers = Headers(scope=scope)
        parts = [scope["path"], scope["query_string"]]
        parts += [part for header in headers.raw for part in header]
        if sum(map(len, parts)) > MAX_HEAD_BYTES:
            raise ApiError("The request's head is too long: send less.", status=431)
        host = headers.get("Host", "").strip()
        if not self._is_own_name(host):
            raise ApiError(
                "This server does not go by that name: use its address, or start it with "
                "--allowed-hosts and the name.",
                status=403,
            )
        if not self._may_ask(host, headers):
            raise ApiError(
                "Scripts of other sites may not use this server: start it with --allowed-origins "
                "and the site's origin to allow one.",
                status=403,
            )
        is_public = self.token is None or self._is_public(scope, headers)
        if not is_public and self.shown_token(scope) is None:
            raise ApiError(
                "This server needs the token that it printed at its start, as 'Authorization: "
                "Bearer TOKEN' or 'X-Api-Key: TOKEN'.",
                status=401,
            )
        length = headers.get("Content-Length")
        if "Transfer-Encoding" in headers or (scope["method"] == "POST" and length is None):
            raise ApiError("A request with a body needs Content-Length.", status=411)
        if int(length or 0) > self.max_body_bytes:
            raise ApiError(
                f"The request has {length} bytes, and at most {self.max_body_bytes:,} are read: "
                "send less.",
                status=413,
            )

    def _is_own_name(self, host: str) -> bool:
        """Whether a ``Host`` is a name of this server."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower().rstrip(".")
        if name == "localhost" or name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            # Machines of the network answer for names in .local, and the DNS does not.
            return self.token is not None and name.endswith(".local")
        # A page from an address has that address as its origin, so nothing was rebound.
        return address.is_loopback or self.token is not None

    def _may_ask(self, host: str, headers: Headers) -> bool:
        """Whether the page that sends a request, if it is one, is this server's or is allowed.

        A proxy that answers by https may pass on the ``Host`` that it was asked by, or send one of
        its own. The names of --allowed-hosts are not those of another site in either case.
        """
        origin = headers.get("Origin")
        if origin is None:
            # A link on another site may lead here, but its scripts and images may not.
            by_script = headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
            return not by_script or headers.get("Sec-Fetch-Mode") == "navigate"
        if origin in self.origins or origin.lower() == f"http://{host.lower()}":
            return True
        match = _HTTPS_ORIGIN.fullmatch(origin.lower())
        if match is None or match[1].rstrip(".") not in self.proxied:
            return False
        return match[0] == f"https://{host.lower()}" or match[2] is None

    def _is_public(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request needs no token."""
        method = scope["method"]
        if method == "OPTIONS":
            # A browser sends it before the request of an allowed site, and without the token.
            return headers.get("Origin") in self.origins
        return method in ("GET", "HEAD") and scope["path"] in PUBLIC_PATHS

    def shown_token(self, scope: Scope) -> str | None:
        """Returns the server's token if the request carries it, else None.

        The comparison's time does not depend on the token.
        """
        if self.token is None:
            return None
        request = Request(scope)
        token = self.token.encode()
        sent = [request.cookies.get(COOKIE, "")]
        if scope["path"] in QUERY_PATHS:
            sent += request.query_params.getlist("token")
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            sent.append(credentials)
        # Anthropic's clients send it in a header of its own.
        sent.append(request.headers.get("X-Api-Key", ""))
        equal = any(hmac.compare_digest(text.strip().encode(), token) for text in sent)
        if equal:
            return self.token
        return None


def access_of(args: Namespace) -> Access:
    """The rules for clients that the server's flags set."""
    proxied = frozenset(name.strip().lower().rstrip(".") for name in args.allowed_hosts)
    token = None
    own_names: set[str] = set()
    if not is_loopback(args.host):
        token = kept_token(args.token_file)
        # Other machines may call this one by any of these names.
        host_name = socket.gethostname().lower().rstrip(".")
        own_names = {args.host.lower(), host_name, host_name.partition(".")[0]}
        own_names.discard("")
    return Access(
        token=token,
        hosts=proxied | own_names,
        origins=frozenset(args.allowed_origins),
        max_body_bytes=args.max_body_bytes,
        proxied=proxied,
    )


def kept_token(path: Path) -> str:
    """The token in a file, so that a page on a Home Screen opens after a restart.

    A missing file is made, with a token of 99 random bits that can be read aloud and typed.

    Raises:
        ValueError: If the file holds no token.
    """
    is_usual = path == DEFAULT_TOKEN_FILE
    path = path.expanduser()
    if not path.exists():
        if is_usual:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.parent.is_dir():
            raise ValueError(
                f"--token-file {path}: there is no folder {path.parent}, make it first."
            )
        with open(path, "x", opener=lambda name, how: os.open(name, how, 0o600)) as file:
            file.write(_new_token() + "\n")
    token = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            f"{path} does not hold a token (16 to 128 letters, digits, '-' or '_'): delete it for "
            "a new one."
        )
    return token


def _new_token() -> str:
    """A token of five words with four letters each."""
    words = []
    for _ in range(5):
        letters = [secrets.choice(_LETTERS) for _ in range(4)]
        words.append("".join(letters))
    return "-".join(words)
