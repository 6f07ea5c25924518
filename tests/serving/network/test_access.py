"""The rules of access, on requests as clients and attackers send them."""

from email.message import Message
from http import HTTPStatus

import pytest

from mlx_flashhead.serving.network import access
from mlx_flashhead.serving.network.access import Access, is_token, new_token, without_token
from mlx_flashhead.serving.protocol.errors import Problem

TOKEN = "k7mf-3xq2-9tzc-hd4w-p8ns"
LOCAL = Access()
LAN = Access(TOKEN, hosts=frozenset({"studio", "mac.fritz.box"}))


def headers(**fields):
    message = Message()
    message["Host"] = "127.0.0.1:8080"
    for name, value in fields.items():
        name = name.replace("_", "-")
        del message[name]
        for one in [value] if isinstance(value, str) else value:
            message[name] = one
    return message


def status(rules, method="GET", target="/", **fields):
    """Status of the refusal, None for an accepted request."""
    try:
        rules.check(method, target, headers(**fields))
    except Problem as problem:
        return problem.status
    return None


def bearer(token=TOKEN):
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080"])
def test_this_machine_needs_no_token(host):
    assert status(LOCAL, Host=host) is None
    assert status(LOCAL, "POST", "/v1/chat/completions", Host=host, Content_Length="2") is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "mac.local:8080",
        "192.168.1.5:8080",
        "0.0.0.0:8080",
        "",
        "[::1",
        "localhost:80:80",
        "a b",
    ],
)
def test_other_names_are_refused_on_this_machine(host):
    assert status(LOCAL, Host=host) == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize(
    "host",
    [
        "192.168.1.5:8080",
        "[fd00::1]:8080",
        "Mac.local:8080",
        "mac.local.",
        "studio:8080",
        "mac.fritz.box",
        "localhost:8080",
    ],
)
def test_own_names_on_the_network(host):
    assert status(LAN, Host=host, **bearer()) is None
    assert status(LAN, Host=host) == HTTPStatus.UNAUTHORIZED


@pytest.mark.parametrize("host", ["evil.example:8080", "mac.local.evil.example", "local", "nas"])
def test_foreign_names_are_refused_even_with_the_token(host):
    assert status(LAN, Host=host, **bearer()) == HTTPStatus.FORBIDDEN


def test_one_host_header():
    assert status(LOCAL, Host=["localhost", "evil.example"]) == HTTPStatus.BAD_REQUEST
    assert status(LOCAL, Host=[]) == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    "target", ["/", "/v1/models", "/health", "/page/app.js", "/page/info.json"]
)
def test_everything_needs_the_token_on_the_network(target):
    assert status(LAN, target=target) == HTTPStatus.UNAUTHORIZED
    assert status(LAN, target=target, **bearer("k7mf-3xq2-9tzc-hd4w-p8nt")) == 401
    assert status(LAN, target=target, **bearer("")) == 401
    assert status(LAN, target=target, **bearer(TOKEN[:-1])) == 401
    assert status(LAN, target=target, **bearer("tökén\xe9")) == 401
    assert status(LAN, target=target, Authorization=f"Basic {TOKEN}") == 401
    assert status(LAN, target=target, **bearer()) is None
    assert status(LAN, target=target, Cookie=f"a=b; flashhead_token={TOKEN}") is None
    assert status(LAN, target=target, Cookie=f"other={TOKEN}") == 401


def test_token_in_the_address_opens_the_page_only():
    assert status(LAN, target=f"/?token={TOKEN}") is None
    assert status(LAN, target=f"/manifest.webmanifest?token={TOKEN}") is None
    assert status(LAN, target="/?token=wrong") == 401
    assert status(LAN, target=f"/v1/models?token={TOKEN}") == 401
    assert status(LAN, "POST", f"/v1/chat/completions?token={TOKEN}", Content_Length="2") == 401


def test_what_a_home_screen_fetches_is_public():
    for path in ("/manifest.webmanifest", "/apple-touch-icon.png"):
        assert status(LAN, target=path) is None
        assert status(LAN, "POST", path, Content_Length="2") == 401
        assert status(LAN, target=path, Host="evil.example") == 403
    assert status(LAN, target="/apple-touch-icon.png/../v1/models") == 401


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(given, expected):
        compared.append((given, expected))
        return False

    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    assert not LAN.accepts(TOKEN)
    assert compared == [(TOKEN.encode(), TOKEN.encode())]


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "https://127.0.0.1:8080",
        "http://127.0.0.1:9000",
        "",
        "http://localhost:8080",
        "http://127.0.0.1:8080.evil.example",
        "file://",
    ],
)
def test_other_origins_are_refused(origin):
    assert status(LOCAL, "POST", "/v1/models", Origin=origin, Content_Length="2") == 403
    assert status(LAN, Origin=origin, **bearer()) == 403


def test_own_origin_is_served():
    assert (
        status(LOCAL, "POST", "/v1/x", Origin="http://127.0.0.1:8080", Content_Length="2") is None
    )
    own = {"Host": "Mac.local:8080", "Origin": "http://mac.local:8080"}
    assert status(LAN, **own, **bearer()) is None


def test_named_origins_are_served():
    rules = Access(TOKEN, origins=frozenset({"https://chat.example"}))
    site = {"Origin": "https://chat.example", "Sec_Fetch_Site": "cross-site"}
    assert status(rules, **site, **bearer()) is None
    assert status(rules, **site) == 401
    # A preflight carries no token; all it learns is that the site may ask.
    assert status(rules, "OPTIONS", "/v1/chat/completions", **site) is None
    assert status(rules, "OPTIONS", "/v1/models") == 401
    assert rules.cross_origin(headers(**site)) == "https://chat.example"
    assert rules.cross_origin(headers(Origin="http://127.0.0.1:8080")) is None


def test_other_sites_may_link_but_not_load():
    for site in ("cross-site", "same-site"):
        assert status(LOCAL, Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors") == 403
        assert status(LOCAL, Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate") is None
    assert status(LOCAL, Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors") is None
    assert status(LOCAL, Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate") is None


def test_bodies_are_bounded():
    def post(rules=LOCAL, **fields):
        return status(rules, "POST", "/v1/chat/completions", **fields)

    assert post(Content_Length=str(4 << 20)) is None
    assert post(Content_Length=str((4 << 20) + 1)) == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    small = Access(max_body_bytes=100)
    assert post(small, Content_Length="100") is None
    assert post(small, Content_Length="101") == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert post() == HTTPStatus.LENGTH_REQUIRED
    assert post(Transfer_Encoding="chunked") == HTTPStatus.LENGTH_REQUIRED
    assert post(Transfer_Encoding="chunked", Content_Length="2") == HTTPStatus.LENGTH_REQUIRED
    for length in ("-1", "+2", "1e3", "", "²", "9" * 16):  # read(-1) would read without end
        assert post(Content_Length=length) == HTTPStatus.BAD_REQUEST
    assert post(Content_Length=["2", "3"]) == HTTPStatus.BAD_REQUEST


def test_new_tokens_are_random_and_valid():
    tokens = {new_token() for _ in range(50)}
    assert len(tokens) == 50
    assert all(is_token(token) and len(token) == 24 for token in tokens)
    letters = set("".join(tokens)) - {"-"}
    assert len(letters) == 31 and not letters & set("01ilo")


@pytest.mark.parametrize("text", ["", "short", "a" * 129, "has spaces in it, many", "x" * 20 + '"'])
def test_what_is_no_token(text):
    assert not is_token(text)


def test_logs_hold_no_token():
    line = f"GET /?a=b&token={TOKEN}&c=d HTTP/1.1"
    assert without_token(line) == "GET /?a=b&token=…&c=d HTTP/1.1"
    assert without_token("GET /v1/models HTTP/1.1") == "GET /v1/models HTTP/1.1"
