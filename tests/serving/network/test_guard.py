"""The front door, over real connections."""

import json
import re
import socket
from http.client import HTTPConnection

import pytest

from mlx_flashhead.serving.network.access import Access
from mlx_flashhead.serving.network.page_files import FOLDER, page_names
from scripted_server import INFO, scripted_server

TOKEN = "k7mf-3xq2-9tzc-hd4w-p8ns"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def lan():
    """Port and script of a server with a token."""
    with scripted_server(Access(TOKEN, origins=frozenset({"https://chat.example"}))) as server:
        yield server


def ask(port, path, method="GET", body=None, **headers):
    """The response, and its body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_page_with_the_token(lan):
    response, content = ask(lan[0], f"/?token={TOKEN}")
    assert response.status == 200
    assert f'href="/manifest.webmanifest?token={TOKEN}"' in content.decode()
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith(f"flashhead_token={TOKEN};")
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    again, _ = ask(lan[0], "/", Cookie=cookie.split(";")[0])
    assert again.status == 200


def test_page_asks_for_the_token(lan):
    for path, wrong in (("/", False), ("/?token=wrong", True)):
        response, content = ask(lan[0], path)
        assert response.status == 401
        assert response.headers["Set-Cookie"] is None
        text = content.decode()
        assert '<input name="token"' in text and TOKEN not in text
        assert ('<p class="wrong" hidden>' in text) != wrong


def test_home_screen_gets_icon_and_manifest_without_the_token(lan):
    icon, png = ask(lan[0], "/apple-touch-icon.png")
    assert (icon.status, icon.headers["Content-Type"]) == (200, "image/png")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(png[i : i + 4]) for i in (16, 20)] == [180, 180]
    manifest, text = ask(lan[0], "/manifest.webmanifest")
    assert (manifest.status, json.loads(text)["start_url"]) == (200, "/")
    assert TOKEN not in text.decode()
    _, text = ask(lan[0], "/manifest.webmanifest?token=wrong")
    assert json.loads(text)["start_url"] == "/"
    _, text = ask(lan[0], f"/manifest.webmanifest?token={TOKEN}")
    assert json.loads(text)["start_url"] == f"/?token={TOKEN}"


def test_api_refuses_without_the_token(lan):
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("PUT", "/x")):
        response, content = ask(lan[0], path, method, b"{}")
        assert response.status == 401
        assert "token" in json.loads(content)["error"]["message"]
    assert not lan[1].requests and not lan[1].seen


def test_api_answers_with_the_token(lan):
    response, _ = ask(lan[0], "/v1/models", **BEARER)
    assert response.status == 200
    response, content = ask(lan[0], "/page/info.json", **BEARER)
    assert json.loads(content) == INFO


def test_every_file_of_the_page_is_served_with_a_strict_policy(lan):
    assert {"app.js", "vendor/marked/marked.esm.js"} <= page_names()
    for name in page_names():
        response, content = ask(lan[0], f"/page/{name}", **BEARER)
        assert (response.status, content) == (200, (FOLDER / name).read_bytes())
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert response.headers["Referrer-Policy"] == "no-referrer"
    for path in (
        "/page/",
        "/page/../access.py",
        "/page/..%2faccess.py",
        "/page/vendor",
        "/page//etc/passwd",
    ):
        assert ask(lan[0], path, **BEARER)[0].status == 404


def test_no_wildcard_and_no_cross_origin_headers(lan):
    for path in ("/", "/v1/models", "/page/info.json"):
        response, _ = ask(lan[0], path, **BEARER)
        assert not [name for name in response.headers if name.startswith("Access-Control")]
    response, _ = ask(lan[0], "/v1/models", **BEARER, Origin="http://evil.example")
    assert response.status == 403
    response, _ = ask(lan[0], "/v1/models", **BEARER, Host="evil.example")
    assert response.status == 403


def test_head_is_answered_as_get_and_an_empty_line_before_it_is_skipped(lan):
    for path in ("/apple-touch-icon.png", "/health", "/v1/models"):
        _, content = ask(lan[0], path, **BEARER)
        head, nothing = ask(lan[0], path, "HEAD", **BEARER)
        assert (head.status, nothing) == (200, b"")
        assert head.headers["Content-Length"] == str(len(content))
    with socket.create_connection(("127.0.0.1", lan[0]), timeout=20) as connection:
        connection.sendall(b"\r\nHEAD /apple-touch-icon.png HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.0 200")


def test_large_body_is_refused_and_the_reason_read(lan):
    body = b" " * ((4 << 20) + 1)
    response, content = ask(lan[0], "/v1/chat/completions", "POST", body, **BEARER)
    assert response.status == 413
    assert "at most 4,194,304" in json.loads(content)["error"]["message"]


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"GET /?token=%b HTTP/9.9\r\n\r\n" % TOKEN.encode(), 505),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"a b c d\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + 90 * (b"A: " + b"b" * 60_000 + b"\r\n") + b"\r\n", 431),
        (
            b"BREW / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n\r\n"
            % TOKEN.encode(),
            501,
        ),
    ],
    ids=lambda value: str(value)[:25],
)
def test_what_is_no_http_gets_the_same_errors(lan, request_, status):
    with socket.create_connection(("127.0.0.1", lan[0]), timeout=20) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    assert b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not [line for line in lan[1].log if TOKEN in line]


def test_a_request_is_a_line_in_the_log(lan):
    del lan[1].log[:]
    for target in (f"/?token={TOKEN}", "/v1/\x1b[2J\x00"):
        with socket.create_connection(("127.0.0.1", lan[0]), timeout=20) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            while connection.recv(1 << 16):  # the line is there before the end
                pass
    lines = [line for line in lan[1].log if " 431 " not in line]
    assert [re.sub(" [0-9.]+ s$", "", line) for line in lines] == [
        "127.0.0.1 GET /?token=… HTTP/1.1 200",
        "127.0.0.1 GET /v1/\\x1b[2J\\x00 HTTP/1.1 401",
    ]


def test_this_machine_gets_page_and_plain_manifest():
    with scripted_server() as (port, _):
        response, content = ask(port, "/")
        assert response.status == 200 and response.headers["Set-Cookie"] is None
        assert 'href="/manifest.webmanifest"' in content.decode()
