"""The files of the page, with their headers."""

import json
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
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


async def page_file(request: Request) -> Response:
    """A file of the page.

    A Home Screen app does not share the browser's cookies, so the manifest's start address carries
    the client's token, if the server has one.
    """
    path, token = request.scope["path"], request.app.access.shown_token(request.scope)
    query = "" if token is None else f"?token={token}"
    if path == "/":
        text, link = _read("index.html").decode(), 'href="/manifest.webmanifest'
        return _response(text.replace(link, link + query), ".html")
    if path == "/manifest.webmanifest":
        manifest = json.loads(_read("manifest.webmanifest"))
        manifest["start_url"] += query
        return _response(json.dumps(manifest), ".webmanifest")
    if path == "/page/files.json":
        return _response(json.dumps(sorted(page_names())), ".json")
    # looked up in a listing, since a client's text must not become a path
    name = request.path_params.get("name", path[1:])
    if name not in page_names():
        raise HTTPException(404)
    return _response(_read(name), Path(name).suffix)


# A worker serves the addresses beside and below its own, so it is outside of /page/.
_PATHS = ("/", "/manifest.webmanifest", "/apple-touch-icon.png", "/worker.js", "/page/{name:path}")
PAGE_ROUTES = [Route(path, page_file) for path in _PATHS]


@cache
def page_names() -> frozenset[str]:
    """The files under ``/page/``, as paths in the folder."""
    files = (file for file in FOLDER.rglob("*") if file.suffix in _TYPES.keys() - {".json"})
    return frozenset(file.relative_to(FOLDER).as_posix() for file in files)


def locked_page(wrong: bool) -> Response:
    """The page that asks for the token, and says whether a wrong one was given."""
    text = _read("locked.html").decode()
    if not wrong:
        text = text.replace('<p class="wrong">', '<p class="wrong" hidden>')
    return _response(text, ".html", _LOCKED_POLICY, status=401)


def _read(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def _response(content: str | bytes, suffix: str, policy: str = _POLICY, status=200) -> Response:
    headers = {"Content-Type": _TYPES[suffix], "Content-Security-Policy": policy}
    return Response(content, status, headers | _HEADERS)
