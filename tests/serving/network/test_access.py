"""The rules of access, on requests as clients and attackers send them."""

from email.message import Message
from unittest.mock import Mock

import pytest

from mlx_flashhead.serving.network import access
from mlx_flashhead.serving.network.access import Access, without_token
from mlx_flashhead.serving.protocol.api_error import ApiError
from scripted_server import TOKEN

LOCAL = Access()
LAN = Access(TOKEN, hosts=frozenset({"studio", "mac.fritz.box"}))
BEARER = {"Authorization": f"Bearer {TOKEN}"}
POST = {"Content_Length": "2"}


def headers(**fields):
    message = Message()
    for name, value in ({"Host": "127.0.0.1:8080"} | fields).items():
        for one in [value] if isinstance(value, str) else value:
            message[name.replace("_", "-")] = one
    return message


def status(rules, method="GET", target="/", **fields):
    """Status of the refusal, None for an accepted request."""
    try:
        rules.check(method, target, headers(**fields))
    except ApiError as problem:
        return problem.status
    return None


FOREIGN = ("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example")
FOREIGN += ("mac.local.evil.example", "local", "nas", "", "[::1", "localhost:80:80", "a b")


@pytest.mark.parametrize(
    "hosts, local, lan",
    [
        (("127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080"), None, None),
        (("192.168.1.5:8080", "[fd00::1]:8080", "Mac.local:8080", "mac.local."), 403, None),
        (("studio:8080", "mac.fritz.box"), 403, None),
        (FOREIGN, 403, 403),
        ((["localhost", "evil.example"], []), 400, 400),
    ],
)
def test_names_of_the_server(hosts, local, lan):
    """On this machine without a token, on the network with it."""
    for host in hosts:
        assert status(LOCAL, Host=host) == local, host
        assert status(LOCAL, "POST", "/v1/chat/completions", Host=host, **POST) == local, host
        assert status(LAN, Host=host, **BEARER) == lan, host
        assert status(LAN, Host=host) == (lan or 401), host


@pytest.mark.parametrize("target", ["/", "/v1/models", "/health", "/page/app.js"])
def test_everything_needs_the_token_on_the_network(target):
    for fields in (BEARER, {"Cookie": f"a=b; flashhead_token={TOKEN}"}):
        assert status(LAN, target=target, **fields) is None
    wrong = ["k7mf-3xq2-9tzc-hd4w-p8nt", "", TOKEN[:-1], "tökén\xe9"]
    refused = [{"Authorization": f"Bearer {token}"} for token in wrong]
    refused += [{}, {"Authorization": f"Basic {TOKEN}"}, {"Cookie": f"other={TOKEN}"}]
    for fields in refused:
        assert status(LAN, target=target, **fields) == 401


@pytest.mark.parametrize(
    "method, target, expected",
    [
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
    ],
)
def test_token_in_the_address_opens_the_page_only(method, target, expected):
    assert status(LAN, method, target, **POST) == expected
    assert status(LAN, method, target, Host="evil.example", **POST) == 403


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compare = Mock(return_value=False)
    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    assert not LAN.accepts("/", headers(**BEARER))
    compare.assert_called_once_with(TOKEN.encode(), TOKEN.encode())


OWN = "127.0.0.1:8080"
OTHERS = ["http://evil.example", "null", f"https://{OWN}", "http://127.0.0.1:9000", "", "file://"]
SITE = {"Origin": "https://chat.example", "Sec_Fetch_Site": "cross-site"}


@pytest.mark.parametrize("origin", [*OTHERS, "http://localhost:8080", f"http://{OWN}.evil.example"])
def test_other_origins_are_refused(origin):
    assert status(LOCAL, "POST", "/v1/models", Origin=origin, **POST) == 403
    assert status(LAN, Origin=origin, **BEARER) == 403


def test_own_and_named_origins_are_served():
    assert status(LOCAL, "POST", "/v1/x", Origin=f"http://{OWN}", **POST) is None
    assert status(LAN, Host="Mac.local:8080", Origin="http://mac.local:8080", **BEARER) is None
    rules = Access(TOKEN, origins=frozenset({"https://chat.example"}))
    assert (status(rules, **SITE, **BEARER), status(rules, **SITE)) == (None, 401)
    # A preflight carries no token; all it learns is that the site may ask.
    assert status(rules, "OPTIONS", "/v1/chat/completions", **SITE) is None
    assert status(rules, "OPTIONS", "/v1/models") == 401
    assert rules.cross_origin(headers(**SITE)) == "https://chat.example"
    assert rules.cross_origin(headers(Origin=f"http://{OWN}")) is None


@pytest.mark.parametrize(
    "site, mode, expected",
    [
        ("cross-site", "no-cors", 403),
        ("same-site", "no-cors", 403),
        ("cross-site", "navigate", None),
        ("same-site", "navigate", None),
        ("none", "navigate", None),
        ("same-origin", "cors", None),
    ],
)
def test_other_sites_may_link_but_not_load(site, mode, expected):
    assert status(LOCAL, Sec_Fetch_Site=site, Sec_Fetch_Mode=mode) == expected


@pytest.mark.parametrize(
    "rules, fields, expected",
    [
        (LOCAL, {"Content_Length": str(4 << 20)}, None),
        (LOCAL, {"Content_Length": str((4 << 20) + 1)}, 413),
        (Access(max_body_bytes=100), {"Content_Length": "100"}, None),
        (Access(max_body_bytes=100), {"Content_Length": "101"}, 413),
        (LOCAL, {}, 411),
        (LOCAL, {"Transfer_Encoding": "chunked"}, 411),
        (LOCAL, {"Transfer_Encoding": "chunked", "Content_Length": "2"}, 411),
        # read(-1) would read without end
        *((LOCAL, {"Content_Length": n}, 400) for n in ("-1", "+2", "1e3", "", "²", "9" * 16)),
        (LOCAL, {"Content_Length": ["2", "3"]}, 400),
    ],
)
def test_bodies_are_bounded(rules, fields, expected):
    assert status(rules, "POST", "/v1/chat/completions", **fields) == expected


def test_logs_hold_no_token():
    line = f"GET /?a=b&token={TOKEN}&c=d HTTP/1.1"
    assert without_token(line) == "GET /?a=b&token=…&c=d HTTP/1.1"
