"""The front door, over real connections."""

import json
import re
import socket

import pytest

from mlx_flashhead.serving.network.access import Access
from mlx_flashhead.serving.network.page_files import FOLDER, page_names
from scripted_server import INFO, TOKEN

BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def lan(server):
    """The script of a server with a token."""
    server[1].access = Access(TOKEN, origins=frozenset({"https://chat.example"}))
    return server[1]


def test_page_with_the_token(lan, ask):
    response, content = ask(f"/?token={TOKEN}")
    assert response.status == 200
    assert f'href="/manifest.webmanifest?token={TOKEN}"' in content.decode()
    cookie, *settings = response.headers["Set-Cookie"].split("; ")
    assert cookie == f"flashhead_token={TOKEN}" and {"HttpOnly", "SameSite=Strict"} <= {*settings}
    assert ask("/", Cookie=cookie)[0].status == 200


def test_page_asks_for_the_token(lan, ask):
    for path, wrong in (("/", False), ("/?token=wrong", True)):
        response, content = ask(path)
        assert (response.status, response.headers["Set-Cookie"]) == (401, None)
        text = content.decode()
        assert '<input name="token"' in text and TOKEN not in text
        assert ('<p class="wrong" hidden>' in text) != wrong


def test_home_screen_gets_icon_and_manifest(lan, ask):
    icon, png = ask("/apple-touch-icon.png")
    assert (icon.status, icon.headers["Content-Type"]) == (200, "image/png")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(png[i : i + 4]) for i in (16, 20)] == [180, 180]
    for query, start in (("", "/"), ("?token=wrong", "/"), (f"?token={TOKEN}", f"/?token={TOKEN}")):
        manifest, text = ask(f"/manifest.webmanifest{query}")
        assert (manifest.status, json.loads(text)["start_url"]) == (200, start)


@pytest.mark.parametrize(
    "method, path", [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("PUT", "/x")]
)
def test_api_answers_with_the_token_alone(lan, ask, method, path):
    response, content = ask(path, method, b"{}")
    assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "token" in json.loads(content)["error"]["message"]
    assert not lan.requests
    assert ask(path, method, b"{}", **BEARER)[0].status == (501 if method == "PUT" else 200)


def test_every_file_of_the_page_is_served_with_a_strict_policy(lan, ask):
    assert {"app.js", "vendor/marked/marked.esm.js"} <= page_names()
    for name in page_names():
        response, content = ask(f"/page/{name}", **BEARER)
        assert (response.status, content) == (200, (FOLDER / name).read_bytes())
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert response.headers["Referrer-Policy"] == "no-referrer"
    for name in ("", "../access.py", "..%2faccess.py", "vendor", "/etc/passwd"):
        assert ask(f"/page/{name}", **BEARER)[0].status == 404


def test_no_wildcard_and_no_cross_origin_headers_but_for_allowed_sites(lan, ask):
    def allowed(response):
        return [v for name, v in response.headers.items() if name.startswith("Access-Control")]

    for path in ("/", "/v1/models", "/page/info.json"):
        assert not allowed(ask(path, **BEARER)[0])
    for refused in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        response, _ = ask("/v1/models", **BEARER, **refused)
        assert response.status == 403 and not allowed(response)
    response, _ = ask("/v1/models", "OPTIONS", Origin="https://chat.example")
    methods = ["https://chat.example", "GET, POST", "Authorization, Content-Type"]
    assert (response.status, allowed(response)) == (204, methods)


def test_head_is_answered_as_get_and_an_empty_line_before_it_is_skipped(lan, ask, connect):
    for path in ("/apple-touch-icon.png", "/health", "/v1/models"):
        _, content = ask(path, **BEARER)
        head, nothing = ask(path, "HEAD", **BEARER)
        assert (head.status, nothing) == (200, b"")
        assert head.headers["Content-Length"] == str(len(content))
    connection = connect(b"\r\nHEAD /apple-touch-icon.png HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(1 << 16).startswith(b"HTTP/1.0 200")


def test_large_body_is_refused_and_the_reason_read(lan, ask):
    response, content = ask("/v1/chat/completions", "POST", b" " * ((4 << 20) + 1), **BEARER)
    assert response.status == 413 and b"at most 4,194,304" in content


BREW = "BREW / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer"


@pytest.mark.parametrize(
    "request_, status",
    [
        (f"GET /?token={TOKEN} HTTP/9.9\r\n\r\n".encode(), 505),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"a b c d\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + 90 * (b"A: " + b"b" * 60_000 + b"\r\n") + b"\r\n", 431),
        (f"{BREW} {TOKEN}\r\n\r\n".encode(), 501),
    ],
    ids=lambda value: str(value)[:25],
)
def test_what_is_no_http_gets_the_same_errors(lan, connect, request_, status):
    connection = connect(request_)
    connection.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert b"Content-Type: application/json" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert not [line for line in lan.log if TOKEN in line]


def test_a_request_is_a_line_in_the_log(lan, connect):
    for target in (f"/?token={TOKEN}", "/v1/\x1b[2J\x00"):
        connection = connect(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        while connection.recv(1 << 16):  # the line is there before the end
            pass
    lines = [line for line in lan.log if " 431 " not in line]
    assert [re.sub(" [0-9.]+ s$", "", line) for line in lines] == [
        "127.0.0.1 GET /?token=… HTTP/1.1 200",
        "127.0.0.1 GET /v1/\\x1b[2J\\x00 HTTP/1.1 401",
    ]


def test_this_machine_gets_page_and_plain_manifest(server, ask):
    response, content = ask("/")
    assert response.status == 200 and response.headers["Set-Cookie"] is None
    assert 'href="/manifest.webmanifest"' in content.decode()
    assert json.loads(ask("/page/info.json")[1]) == INFO
