"""What the server sends and reads: OpenAI's errors, strict JSON, and the files of the page."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MAX_DEPTH = 100  # levels of JSON; what reads and writes it calls itself for each
FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    **dict.fromkeys((".js", ".mjs"), "text/javascript"),
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
# Allows the page's own files only, without scripts or styles in the text or a frame around it.
# Only DOMPurify may turn a text into HTML, and connection.js start a worker.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify worker"
)
# The page that asks for the token loads nothing: its few styles are in it.
_LOCKED_POLICY = _POLICY.replace("style-src 'self'", "style-src 'unsafe-inline'")


class ApiError(ValueError):
    """A rejected request: a sentence, the wrong field if there is one, and a word for programs."""

    def __init__(self, message: str, field: str | None = None, *, status: int = 400, code=None):
        super().__init__(message)
        self.field, self.status, self.code = field, status, code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


def loads(text: bytes) -> Any:
    """Reads JSON. ValueError if it is none, or too deep, or holds a number that is not finite or
    half of a character, which no tokenizer takes."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, MAX_DEPTH)
    return value


def _check(value: Any, levels: int) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError("it is nested too deeply")
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check(part, levels - 1)


def dumps(value: Any) -> str:
    """Writes JSON, with null for numbers that are not finite."""
    finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(finite)


def json_response(value: Any, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(dumps(value), status, headers, media_type="application/json")


async def page_file(request: Request) -> Response:
    """A file of the page. A Home Screen app does not share the browser's cookies, so links to the
    manifest and from there to the page carry the client's token, if the server has one."""
    name = request.path_params.get("name", request.scope["path"][1:] or "index.html")
    if name == "files.json":
        return _page_response(json.dumps(sorted(page_names())), ".json")
    # looked up in a listing, since a client's text must not become a path
    if name not in page_names():
        raise HTTPException(404)
    content, token = (FOLDER / name).read_bytes(), request.app.access.shown_token(request.scope)
    if token and "name" not in request.path_params:
        for link in (b'href="/manifest.webmanifest', b'"start_url": "/'):
            content = content.replace(link, link + f"?token={token}".encode())
    return _page_response(content, Path(name).suffix)


# A worker serves the addresses beside and below its own, so it is outside of /page/.
_PATHS = ("/", "/manifest.webmanifest", "/apple-touch-icon.png", "/worker.js", "/page/{name:path}")
PAGE_ROUTES = [Route(path, page_file) for path in _PATHS]


def locked_page(wrong: bool) -> Response:
    """The page that asks for the token, and says whether the last one was wrong."""
    text = (FOLDER / "locked.html").read_text("utf-8")
    if not wrong:
        text = text.replace('<p class="wrong">', '<p class="wrong" hidden>')
    return _page_response(text, ".html", _LOCKED_POLICY, status=401)


@cache
def page_names() -> frozenset[str]:
    """The files under ``/page/``, as paths in the folder."""
    files = (file for file in FOLDER.rglob("*") if file.suffix in _TYPES.keys() - {".json"})
    return frozenset(file.relative_to(FOLDER).as_posix() for file in files)


def _page_response(content: str | bytes, suffix: str, policy=_POLICY, status=200) -> Response:
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    return Response(content, status, headers, media_type=_TYPES[suffix])
