"""Who may use the server: rules on the token, the Host, the Origin and the size of a request.

On 127.0.0.1 there is no token, but the Host must be a name of this machine. Otherwise any web page
could reach the server if its own name resolves to this address (DNS rebinding). On a network every
request except the icon's and the manifest's needs the token too.
"""

import hmac
import ipaddress
import re
from dataclasses import dataclass
from email.message import Message
from urllib.parse import parse_qs, urlsplit

from ..protocol.api_error import ApiError

COOKIE = "flashhead_token"
# An operating system fetches these without cookies to put a page on the Home Screen.
PUBLIC_PATHS = frozenset({"/manifest.webmanifest", "/apple-touch-icon.png"})
# A browser that opens one of these cannot send a header. Elsewhere the address must not carry the
# token, since browsers keep addresses in their histories.
QUERY_PATHS = frozenset({"/", "/manifest.webmanifest"})

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
_TOKEN_IN_TARGET = re.compile(r"(?<=[?&]token=)[^&\s]*")


@dataclass(frozen=True)
class Access:
    """The rules of one server."""

    token: str | None = None  # that clients send; None on 127.0.0.1, where they need none
    hosts: frozenset[str] = frozenset()  # further names of the server, in lower case
    origins: frozenset[str] = frozenset()  # of other sites whose scripts may use the API
    max_body_bytes: int = 4 << 20

    def check(self, method: str, target: str, headers: Message) -> None:
        """Raises an ApiError unless a request may be served; ``target`` is its path and query."""
        self._check_host(headers)
        self._check_origin(headers)
        self._check_token(method, target, headers)
        self._check_body(method, headers)

    def accepts(self, target: str, headers: Message) -> bool:
        """Whether a request has the token, in a time that does not depend on it; or needs none."""
        if self.token is None:
            return True
        sent = query_tokens(target) if path_of(target) in QUERY_PATHS else []
        scheme, _, credentials = headers.get("Authorization", "").partition(" ")
        sent += [credentials] if scheme.lower() == "bearer" else []
        cookies = (part.strip().partition("=") for part in headers.get("Cookie", "").split(";"))
        sent += [value for name, _, value in cookies if name == COOKIE]
        own = self.token.encode()
        return any(hmac.compare_digest(token.strip().encode(), own) for token in sent)

    def cross_origin(self, headers: Message) -> str | None:
        """The request's Origin if it is an allowed site, else None."""
        origin = headers.get("Origin")
        return origin if origin in self.origins else None

    def _check_host(self, headers: Message) -> None:
        hosts = headers.get_all("Host", [])
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

    def _check_origin(self, headers: Message) -> None:
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

    def _check_token(self, method: str, target: str, headers: Message) -> None:
        preflight = method == "OPTIONS" and self.cross_origin(headers) is not None
        if preflight or (method in ("GET", "HEAD") and path_of(target) in PUBLIC_PATHS):
            return
        if not self.accepts(target, headers):
            how = "as 'Authorization: Bearer TOKEN'"
            needed = "This server needs the token that it printed at its start"
            raise ApiError(f"{needed}, {how}.", status=401)

    def _check_body(self, method: str, headers: Message) -> None:
        lengths = headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in headers or (method == "POST" and not lengths):
            raise ApiError("A request with a body needs Content-Length.", status=411)
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,15}", length) for length in lengths):
            raise ApiError("Content-Length must be one whole number.")
        if lengths and (n_bytes := int(lengths[0])) > self.max_body_bytes:
            most = f"at most {self.max_body_bytes:,} are read"
            raise ApiError(f"The request has {n_bytes:,} bytes, and {most}: send less.", status=413)


def path_of(target: str) -> str:
    return target.partition("?")[0]


def query_tokens(target: str) -> list[str]:
    """The tokens in the query of a request's target."""
    return parse_qs(urlsplit(target).query).get("token", [])


def without_token(target: str) -> str:
    """A request line or target without the token, for a log."""
    return _TOKEN_IN_TARGET.sub("…", target)
