"""What a body may hold, and that nobody waits for another's."""

import json
import time
from contextlib import ExitStack
from http.client import HTTPConnection
from threading import Event

import pytest

from engines import flags
from mlx_flashhead.common.guarded import Guard, LeftError
from mlx_flashhead.serving import bodies, completions, endpoints
from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.bodies import check_size, fields_of
from mlx_flashhead.serving.endpoints import Api
from mlx_flashhead.serving.serve import Server
from scripted_server import running
from test_endpoints import PlayedEngine


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"[5]," * 60_000 + b"[5]]}",
        b'{"a": {' + b'"x":1,' * 60_000 + b'"x":1}}',
        b'{"prompt": [' + b"5," * 400_000 + b"5]}",
        b"[" * 60_000,
    ],
    ids=["lists", "members", "values", "depth"],
)
def test_values_are_counted_before_any_is_made(monkeypatch, body):
    monkeypatch.setattr(bodies, "read_json", None)
    with pytest.raises(ApiError, match=r"at most (50|300),000"):
        fields_of(body)


def test_what_stands_in_a_text_is_no_value():
    text = 'a "quoted" \\ path, [{:' * 100_000 + "\\"
    fields = {"messages": [{"role": "user", "content": text}], "tools": []}
    assert fields_of(json.dumps(fields).encode()) == fields
    check_size(b"")


@pytest.fixture
def send(tiny):
    """A function that sends a request of an address: (address, fields) → the connection."""
    engine = PlayedEngine()
    engine.models.set_result([tiny])
    router = Api(flags(), engine).router()

    async def from_address(scope, receive, send):
        headers = dict(scope["headers"])
        scope["client"] = (headers[b"x-address"].decode(), 1)
        await router(scope, receive, send)

    server = Server(from_address, Access())
    with running(server) as port, ExitStack() as opened:

        def send(address, **fields):
            connection = HTTPConnection("127.0.0.1", port, timeout=20)
            opened.callback(connection.close)
            body = json.dumps(fields)
            headers = {"X-Address": address}
            connection.request("POST", "/v1/completions", body, headers)
            return connection

        send.connections = server.server_state.connections
        yield send


class Held:
    """Reads no request whose prompt is "hold" before it may, and notes all of them."""

    def __init__(self, monkeypatch):
        self.seen = []
        self.go = Event()
        monkeypatch.setattr(completions, "read_jobs", self.read)

    def read(self, fields, **options):
        self.seen.append(fields["prompt"])
        if fields["prompt"].startswith("hold"):
            assert self.go.wait(20)
        raise ApiError("It was read.")

    def wait_for(self, number):
        wait_until(lambda: len(self.seen) >= number)


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def was_read(connection):
    return json.loads(connection.getresponse().read())["error"]["message"] == "It was read."


def test_another_address_is_served_while_the_first_one_s_readers_are_full(monkeypatch, send):
    held = Held(monkeypatch)
    first = [send("a", prompt="hold") for _ in range(12)]
    held.wait_for(2)
    assert was_read(send("b", prompt="other"))
    assert held.seen == ["hold", "hold", "other"]
    held.go.set()
    assert all(was_read(connection) for connection in first)


def test_grammars_have_their_own_readers(monkeypatch, send):
    held = Held(monkeypatch)
    first = [send("a", prompt="hold", regex="a+") for _ in range(12)]
    held.wait_for(2)
    assert was_read(send("a", prompt="the same address without one"))
    assert was_read(send("b", prompt="another address", regex="a+"))
    assert held.seen.count("hold") == 2
    held.go.set()
    assert all(was_read(connection) for connection in first)


def test_an_address_has_one_large_body_in_memory(monkeypatch, send):
    """The others stay with their clients, and small ones go past."""
    held = Held(monkeypatch)
    received = []
    read_body = endpoints.read_body

    async def read(request):
        body = await read_body(request)
        received.append(len(body))
        return body

    monkeypatch.setattr(endpoints, "read_body", read)
    large = "hold" + "x" * bodies.LARGE_BODY
    first = [send("a", prompt=large) for _ in range(4)]
    held.wait_for(1)
    assert was_read(send("a", prompt="small"))
    assert was_read(send("b", prompt="x" * bodies.LARGE_BODY))
    assert sum(size > bodies.LARGE_BODY for size in received) == 2
    held.go.set()
    assert all(was_read(connection) for connection in first)


def test_nothing_is_read_for_a_client_that_has_left(monkeypatch, send):
    held = Held(monkeypatch)
    for _ in range(2):
        send("a", prompt="hold")
    held.wait_for(2)
    leaving = send("a", prompt="left")
    wait_until(lambda: len(send.connections) == 3)
    leaving.close()
    wait_until(lambda: len(send.connections) == 2)
    last = send("a", prompt="last")
    held.go.set()
    assert was_read(last)
    assert "left" not in held.seen


def test_what_is_computed_to_read_a_request_ends_when_its_client_leaves(
    monkeypatch, send, tmp_path
):
    (tmp_path / "work.py").write_text("def work(request):\n    while True:\n        pass\n")
    guard = Guard(tmp_path / "work.py", seconds=1000)
    begun = Event()
    ended = Event()

    def read(fields, **_):
        begun.set()
        try:
            return guard.call(None)
        except LeftError:
            ended.set()
            raise

    monkeypatch.setattr(completions, "read_jobs", read)
    leaving = send("a", prompt="x")
    assert begun.wait(20) and not ended.is_set()
    leaving.close()
    assert ended.wait(20)
    wait_until(lambda: not send.connections)
