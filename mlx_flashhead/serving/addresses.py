"""A server on the local network: its address, its token, and both as a QR code."""

import io
import ipaddress
import os
import re
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from ..common.command import from_extra

TOKEN_FILE = Path("~/.config/mlx_flashhead/lan-token")
_TOKEN = re.compile(r"[0-9A-Za-z_-]{16,128}")  # unchanged in an address
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # letters and digits that people do not mix up


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def own_address(host: str) -> str:
    """The address under which others reach ``host``; 127.0.0.1 without a route to any network."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # chooses the interface for an address that is reserved for documentation; sends nothing
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


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


def url(host: str, port: int, token: str | None = None) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def announce(host: str, port: int, token: str, out: TextIO) -> None:
    """Prints how another device opens the page and uses the API of a server on ``host``.

    The page's part comes last, and is on the screen if that has 80 columns and 24 lines. Its code
    is for a dark terminal, but for one with colours, where it brings its own.
    """
    address = own_address(host)
    page = url(address, port, token)
    before, after = ("\x1b[97;40m", "\x1b[0m") if out.isatty() else ("", "")  # white on black
    try:
        segno = from_extra("segno", "qr", "A QR code of this address")
        made, lines = segno.make(page, error="l", micro=False), io.StringIO()
        # with a wide border the code of a full IPv6 address leaves no line for the text
        made.terminal(lines, compact=True, border=2 if made.version < 5 else 1)
        code = "\n".join(f"{before}{line}{after}" for line in lines.getvalue().splitlines())
        code.encode(out.encoding or "ascii")
    except UnicodeEncodeError:  # ASCII would make the code too large
        code = f"A QR code of it needs a terminal with UTF-8. This one has {out.encoding}."
    except ValueError as missing:
        code = str(missing)
    print(
        f"Programs use {url(address, port)}v1 with the token as their API key.",
        "Whoever has the token can use the model. The connection is not encrypted.",
        "Open this on an iPad, an iPhone or any computer of the network:",
        code,
        f"  {page}",
        sep="\n",
        file=out,
        flush=True,
    )
