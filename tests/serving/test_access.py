"""The rules of access, on requests as clients and attackers send them, and the front door."""

import json
import socket
import time

import pytest

from engines import flags
from mlx_flashhead.serving.access import Access, access_of
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.page_files import FOLDER, page_names
from mlx_flashhead.serving.server_options import check_options, make_parser
from scripted_server import INFO, TOKEN

LOCAL = Access()
LAN = Access(TOKEN, hosts=frozenset({"studio", "mac.fritz.box"}))
BEARER = {"Authorization": f"Bearer {TOKEN}"}
POST = {"Content_Length": "2"}
COOKIE = f"flashhead_token={TOKEN}"


def status(rules, method="GET", target="/", **fields):
    """Status of the refusal, None for an accepted request."""
    fields = {"Host": "127.0.0.1:8080"} | fields
    raw = [(k.replace("_", "-").lower().encode(), v.encode()) for k, v in fields.items()]
    path, _, query = target.partition("?")
    scope = {"type": "http", "method": method, "path": path}
    try:
        rules.check(scope | {"query_string": query.encode(), "headers": raw})
    except ApiError as problem:
        return problem.status
    return None


FOREIGN = ("evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "a b")
FOREIGN += ("mac.local.evil.example", "local", "nas", "", "localhost:80:80")


@pytest.mark.parametrize(
    "hosts, local, lan",
    [
        (("127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080"), None, None),
        (("192.168.1.5:8080", "[fd00::1]:8080", "Mac.local:8080", "mac.local."), 403, None),
        (("studio:8080", "mac.fritz.box"), 403, None),
        (FOREIGN, 403, 403),
    ],
)
def test_names_of_the_server(hosts, local, lan):
    """On this machine without a token, on the network with it."""
    if lan is None:
        without_token = 401
    else:
        without_token = lan
    for host in hosts:
        assert status(LOCAL, Host=host) == local, host
        assert status(LOCAL, "POST", "/v1/chat/completions", Host=host, **POST) == local, host
        assert status(LAN, Host=host, **BEARER) == lan, host
        assert status(LAN, Host=host) == without_token, host


def test_everything_needs_the_token_on_the_network():
    wrong = [f"Bearer {token}" for token in (f"{TOKEN[:-1]}t", "", TOKEN[:-1], "tökén\xe9")]
    refused = [{"Authorization": value} for value in (*wrong, f"Basic {TOKEN}")]
    refused += [{}, {"Cookie": f"other={TOKEN}"}]
    for target in ("/", "/v1/models", "/health", "/page/app.js"):
        for fields in (BEARER, {"Cookie": f"a=b; {COOKIE}"}):
            assert status(LAN, target=target, **fields) is None
        assert [status(LAN, target=target, **fields) for fields in refused] == [401] * 7


def test_token_in_the_address_opens_the_page_only():
    for method, target, expected in (
        ("GET", f"/?token={TOKEN}", None),
        ("GET", f"/manifest.webmanifest?token={TOKEN}", None),
        ("GET", "/?token=wrong", 401),
        ("GET", f"/v1/models?token={TOKEN}", 401),
        ("POST", f"/v1/chat/completions?token={TOKEN}", 401),
        # what a Home Screen fetches
        ("GET", "/manifest.webmanifest", None),
        ("GET", "/apple-touch-icon.png", None),
        ("POST", "/apple-touch-icon.png", 401),
        ("GET", "/apple-touch-icon.png/../v1/models", 401),
    ):
        assert status(LAN, method, target, **POST) == expected
        assert status(LAN, method, target, Host="evil.example", **POST) == 403


OWN = "127.0.0.1:8080"
OTHERS = ["http://evil.example", "null", f"https://{OWN}", "http://127.0.0.1:9000", "", "file://"]
OTHERS += ["http://localhost:8080", f"http://{OWN}.evil.example"]
SITE = {"Origin": "https://chat.example", "Sec_Fetch_Site": "cross-site"}


def test_own_and_named_origins_are_served_and_no_others():
    for origin in OTHERS:
        assert status(LOCAL, "POST", "/v1/models", Origin=origin, **POST) == 403
        assert status(LAN, Origin=origin, **BEARER) == 403
    assert status(LOCAL, "POST", "/v1/x", Origin=f"http://{OWN}", **POST) is None
    assert status(LAN, Host="Mac.local:8080", Origin="http://mac.local:8080", **BEARER) is None
    rules = Access(TOKEN, origins=frozenset({"https://chat.example"}))
    assert (status(rules, **SITE, **BEARER), status(rules, **SITE)) == (None, 401)
    # A preflight carries no token; all it learns is that the site may ask.
    assert status(rules, "OPTIONS", "/v1/chat/completions", **SITE) is None
    assert status(rules, "OPTIONS", "/v1/models") == 401
    # Other sites may link here, but load nothing.
    for site, mode, expected in (
        *((site, "no-cors", 403) for site in ("cross-site", "same-site")),
        *((site, "navigate", None) for site in ("cross-site", "same-site", "none")),
        ("same-origin", "cors", None),
    ):
        assert status(LOCAL, Sec_Fetch_Site=site, Sec_Fetch_Mode=mode) == expected


NAME = "chat.example"


@pytest.mark.parametrize("lan", [False, True])
def test_a_page_behind_a_proxy_is_the_servers_own(tmp_path, lan):
    """The proxy answers by https, and passes on the name that it was asked by or its own."""
    (tmp_path / "token").write_text(TOKEN)
    arguments = ["--allowed-hosts", f"other.example,{NAME}", "--token-file", tmp_path / "token"]
    if lan:
        arguments.append("--lan")
    parsed = flags(*arguments)
    check_options(make_parser(), parsed)
    rules = access_of(parsed)
    chat = ("POST", "/v1/chat/completions")
    sent = POST | BEARER
    for host, origin, expected in (
        (NAME, f"https://{NAME}", None),
        (f"{NAME}:8443", f"https://{NAME}:8443", None),
        ("127.0.0.1:8080", f"https://{NAME}", None),
        (NAME, f"https://{NAME.upper()}", None),
        (NAME, "https://evil.example", 403),
        (NAME, f"https://{NAME}.evil.example", 403),
        (NAME, f"https://evil.{NAME}", 403),
        # This is another server of that machine.
        (NAME, f"https://{NAME}:8443", 403),
        ("127.0.0.1:8080", f"https://{NAME}:8443", 403),
        ("127.0.0.1:8080", f"http://{NAME}", 403),
        ("127.0.0.1:8080", "https://127.0.0.1:8080", 403),
        ("evil.example", f"https://{NAME}", 403),
    ):
        assert status(rules, *chat, Host=host, Origin=origin, **sent) == expected, (host, origin)
    if lan:
        assert status(rules, *chat, Host=NAME, Origin=f"https://{NAME}", **POST) == 401
    assert status(LAN, *chat, Host="studio", Origin="https://studio", **sent) == 403


def test_bodies_are_bounded():
    for rules, most in ((LOCAL, 4 << 20), (Access(max_body_bytes=100), 100)):
        for length, expected in ((most, None), (most + 1, 413), ("9" * 20, 413)):
            assert status(rules, "POST", "/v1/x", Content_Length=str(length)) == expected
    for fields in ({}, {"Transfer_Encoding": "chunked"}, {"Transfer_Encoding": "chunked"} | POST):
        assert status(LOCAL, "POST", "/v1/x", **fields) == 411


@pytest.fixture
def lan(script):
    """The script of a server with a token."""
    script.access = Access(TOKEN, origins=frozenset({"https://chat.example"}))
    return script


def test_the_page_needs_the_token_and_keeps_it(lan, ask):
    for path, wrong in (("/", False), ("/?token=wrong", True)):
        response, content = ask(path)
        assert (response.status, response.headers["Set-Cookie"]) == (401, None)
        text = content.decode()
        assert '<input name="token"' in text and TOKEN not in text
        assert ('<p class="wrong" hidden>' in text) != wrong
    response, content = ask(f"/?token={TOKEN}")
    assert response.status == 200
    assert f'href="/manifest.webmanifest?token={TOKEN}"' in content.decode()
    cookie, *settings = response.headers["Set-Cookie"].split("; ")
    assert cookie == COOKIE and {"HttpOnly", "SameSite=Strict"} <= {*settings}
    assert ask("/", Cookie=cookie)[0].status == 200


def test_this_machine_gets_page_and_plain_manifest(server, ask):
    response, content = ask("/")
    assert response.status == 200 and response.headers["Set-Cookie"] is None
    assert 'href="/manifest.webmanifest"' in content.decode()
    assert json.loads(ask("/page/info.json")[1]) == INFO


def test_home_screen_gets_icon_and_manifest(lan, ask):
    icon, png = ask("/apple-touch-icon.png")
    assert (icon.status, icon.headers["Content-Type"]) == (200, "image/png")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(png[i : i + 4]) for i in (16, 20)] == [180, 180]
    for query, start in (("", "/"), ("?token=wrong", "/"), (f"?token={TOKEN}", f"/?token={TOKEN}")):
        manifest, text = ask(f"/manifest.webmanifest{query}")
        assert (manifest.status, json.loads(text)["start_url"]) == (200, start)


def test_api_answers_with_the_token_alone(lan, ask):
    chat = ("/v1/chat/completions", "POST")
    for path, method, served in (("/v1/models", "GET", 200), ("/x", "PUT", 404), (*chat, 200)):
        response, content = ask(path, method, b"{}")
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "token" in json.loads(content)["error"]["message"] and not lan.requests
        assert ask(path, method, b"{}", **BEARER)[0].status == served
    response, content = ask(*chat, b" " * ((4 << 20) + 1), **BEARER)
    assert response.status == 413 and b"at most 4,194,304" in content


def test_every_file_of_the_page_is_served_with_a_strict_policy(lan, ask):
    assert len(page_names()) > 10
    for name in page_names():
        response, content = ask(f"/page/{name}", **BEARER)
        assert (response.status, content) == (200, (FOLDER / name).read_bytes())
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert response.headers["Referrer-Policy"] == "no-referrer"
    for name in ("", "../access.py", "..%2faccess.py", "vendor", "/etc/passwd"):
        assert ask(f"/page/{name}", **BEARER)[0].status == 404
    logged = [line for line in lan.log if "/page/" in line]
    # A file that is served has no line in the log.
    assert all(" 404, " in line for line in logged)


def test_no_wildcard_and_no_cross_origin_headers_but_for_allowed_sites(lan, ask):
    def allowed(response):
        return [v for name, v in response.headers.items() if name.startswith("access-control")]

    assert not any(allowed(ask(path, **BEARER)[0]) for path in ("/", "/v1/models"))
    for refused in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        response, _ = ask("/v1/models", **BEARER, **refused)
        assert response.status == 403 and not allowed(response)
    response, _ = ask("/v1/models", "OPTIONS", Origin="https://chat.example")
    methods = ["https://chat.example", "GET, POST"]
    methods.append("Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta")
    assert (response.status, allowed(response)) == (204, methods)


HOST = b"Host: localhost\r\n"
LENGTHS = ("-1", "+2", "1e3", "", "\xb2", "9" * 30, "2\r\nContent-Length: 3")
WITH_WRONG_LENGTHS = [
    f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode("latin-1")
    for length in LENGTHS
]


@pytest.mark.parametrize(
    "request_, status",
    [
        (f"GET /?token={TOKEN} HTTP/x\r\n\r\n".encode(), 400),
        (b"a b c d\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 403),
        (b"GET /\x1b[2J\x00 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        *((sent, 400) for sent in WITH_WRONG_LENGTHS),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + 90 * (b"A: " + b"b" * 60_000 + b"\r\n") + b"\r\n", 431),
        (f"BREW / HTTP/1.1\r\nHost: a.local\r\nCookie: {COOKIE}\r\n\r\n".encode(), 405),
    ],
    ids=lambda value: str(value)[:25],
)
def test_what_is_no_http_gets_the_same_errors(lan, connect, request_, status):
    connection = connect(request_)
    connection.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == b"%d" % status and b"application/json" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert not [line for line in lan.log if TOKEN in line]


def test_the_log_has_refusals_and_no_token(lan, ask):
    """However it is written: queries are not logged at all."""
    queries = ("token={}", "%74oken={}", "TOKEN={}", "a;token={}", "a={}")
    logged = {f"/v1/x?{query}": "/v1/x" for query in queries}
    logged |= {"/v1/token={}": "/v1/token=…", "/v1/%3Ftoken={}%0a%1b[2J": r"/v1/?token=…\n\x1b[2J"}
    for path in logged:
        if "TOKEN" in path:
            ask(path.format(TOKEN.upper()))
        else:
            ask(path.format(TOKEN))
    # A line is written when its client has the answer.
    while len(lan.log) < len(logged):
        time.sleep(0.01)
    lines = [line.rpartition(", ")[0] for line in lan.log]
    assert lines == [f"127.0.0.1 GET {path} 401" for path in logged.values()]
