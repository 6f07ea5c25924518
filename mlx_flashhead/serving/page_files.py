"""The files of the chat page, with the policy that a browser keeps for them."""

import json
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
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


async def page_file(request: Request) -> Response:
    """A file of the page.

    A Home Screen app does not share the browser's cookies, so links to the manifest and from there
    to the page carry the client's token, if the server has one.
    """
    name = request.path_params.get("name", request.scope["path"][1:] or "index.html")
    if name == "files.json":
        return _page_response(json.dumps(sorted(page_names())), ".json")
    # A listing has the names, since a client's text must not become a path.
    if name not in page_names():
        raise HTTPException(404)
    content = (FOLDER / name).read_bytes()
    token = request.app.access.shown_token(request.scope)
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
    suffixes = _TYPES.keys() - {".json"}
    files = (file for file in FOLDER.rglob("*") if file.suffix in suffixes)
    return frozenset(file.relative_to(FOLDER).as_posix() for file in files)


def _page_response(
    content: str | bytes, suffix: str, policy: str = _POLICY, status: int = 200
) -> Response:
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Response(content, status, headers, media_type=_TYPES[suffix])
