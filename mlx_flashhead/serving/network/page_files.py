"""The files of the page, with their headers."""

import json
from functools import cache
from pathlib import Path

from .access import path_of

FOLDER = Path(__file__).parent.parent / "page"
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
# Allows the page's own files only, without scripts or styles in the text or a frame around it.
# Only DOMPurify may turn a text into HTML, and offline.js start a worker.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify worker"
)
# The page that asks for the token loads nothing: its few styles are in it.
_LOCKED_POLICY = _POLICY.replace("style-src 'self'", "style-src 'unsafe-inline'")
PageFile = tuple[bytes, dict[str, str]]  # a body, and its headers without the length


def page_file(target: str, token: str | None) -> PageFile | None:
    """The file of the page under a request's target, its path and query, or None.

    A Home Screen app does not share the browser's cookies, so the manifest's start address carries
    the client's token, if the server has one.
    """
    path = path_of(target)
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
    # looked up in a listing, since a client's text must not become a path; a worker serves the
    # addresses beside and below its own, so it is outside of /page/
    outside = path in ("/apple-touch-icon.png", "/worker.js")
    name = path.removeprefix("/" if outside else "/page/")
    if name != path and name in page_names():
        return _response(_read(name), Path(name).suffix)
    return None


@cache
def page_names() -> frozenset[str]:
    """The files under ``/page/``, as paths in the folder."""
    files = (file for file in FOLDER.rglob("*") if file.suffix in _TYPES.keys() - {".json"})
    return frozenset(file.relative_to(FOLDER).as_posix() for file in files)


def locked_page(wrong: bool) -> PageFile:
    """The page that asks for the token, and says whether a wrong one was given."""
    text = _read("locked.html").decode()
    if not wrong:
        text = text.replace('<p class="wrong">', '<p class="wrong" hidden>')
    return _response(text, ".html", _LOCKED_POLICY)


def _read(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def _response(content: str | bytes, suffix: str, policy: str = _POLICY) -> PageFile:
    headers = {
        "Content-Type": _TYPES[suffix],
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return content.encode() if isinstance(content, str) else content, headers
