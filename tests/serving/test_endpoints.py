"""The endpoints with an engine that a test plays: while it loads, computes, fails, or ends."""

import json
import re
import time
from concurrent.futures import Future
from contextlib import ExitStack
from http.client import HTTPConnection

import pytest

from engines import flags
from mlx_flashhead.serving import completions
from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.answer_text import Token
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.endpoints import Api
from mlx_flashhead.serving.serve import SHUTTING_DOWN, Server
from scripted_server import running


class PlayedEngine:
    """An engine of which a test says how it is, and what it answers."""

    def __init__(self):
        self.models = Future()
        self.status = "loading"
        self.jobs = []

    def submit(self, jobs):
        self.jobs += jobs

    def next_job(self):
        """The next job that is submitted."""
        while not self.jobs:
            time.sleep(0.01)
        return self.jobs.pop(0)


@pytest.fixture
def engine(tiny):
    """One that has the random model."""
    engine = PlayedEngine()
    engine.models.set_result([tiny])
    return engine


@pytest.fixture
def api(engine):
    return Api(flags(), engine)


@pytest.fixture
def send(api):
    """A function that sends a request, (path, fields) → the connection, on a server of the API."""
    with running(Server(api.router(), Access())) as port, ExitStack() as opened:

        def send(path="/v1/completions", **body):
            connection = HTTPConnection("127.0.0.1", port, timeout=20)
            opened.callback(connection.close)
            if not body and path == "/v1/completions":
                body = {"prompt": "x"}
            if body:
                connection.request("POST", path, json.dumps(body))
            else:
                connection.request("GET", path)
            return connection

        yield send


def answer(connection):
    """(status, body) of its response."""
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_health_and_models_answer_while_the_model_is_loaded(engine, api, send, tiny):
    engine.models = Future()
    assert answer(send("/health")) == (503, '{"status": "loading"}')
    assert answer(send("/"))[0] == 200
    status, body = answer(send("/v1/models"))
    (model,) = json.loads(body)["data"]
    assert (status, model["id"], model["status"]) == (200, "model", "loading")
    assert answer(send("/v1/models/model"))[0] == 200
    assert answer(send("/v1/models/other"))[0] == 404
    status, body = answer(send("/page/info.json"))
    assert status == 503 and "is being loaded" in body
    engine.models.set_result([tiny])
    for engine.status, code in (("ok", 200), ("failing", 503)):
        status, body = answer(send("/health"))
        assert (status, json.loads(body)["status"]) == (code, engine.status)
        (model,) = json.loads(answer(send("/v1/models"))[1])["data"]
        assert (model["id"], model["status"]) == ("tiny", engine.status)
        assert model["decoding"] == "verified"
    assert json.loads(body)["decoding"] == {"tiny": "verified"}


@pytest.fixture
def loading(engine, monkeypatch):
    """The future of an engine that loads. Comments of streams come often."""
    monkeypatch.setattr(completions, "_TICK_SECONDS", 0.02)
    engine.models = Future()
    return engine.models


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_for_its_model(engine, loading, send, tiny, stream):
    connection = send(prompt="x", stream=stream, max_tokens=3)
    if stream:
        response = connection.getresponse()
        assert response.status == 200
        assert [response.readline() for _ in range(4)] == [b": loading\n", b"\n"] * 2
    loading.set_result([tiny])
    engine.next_job().emit(Token("A", finish_reason="stop"))
    if stream:
        rest = response.read().decode()
        assert '"text": "A"' in rest and rest.endswith("data: [DONE]\n\n")
    else:
        status, body = answer(connection)
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, "A")


@pytest.mark.parametrize(
    "path, fields, said",
    [
        ("/v1/completions", {"prompt": "x"}, ": working"),
        ("/v1/responses", {"input": "x"}, ": working"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "x"}]},
            'event: ping\ndata: {"type":"ping"}',
        ),
    ],
)
def test_a_stream_in_which_nothing_is_shown_says_that_it_is_alive(
    engine, send, monkeypatch, path, fields, said
):
    """Before the first token, and while tokens come that make nothing, as those of a call."""
    monkeypatch.setattr(completions, "_SILENT_SECONDS", 0.05)
    connection = send(path, stream=True, max_tokens=9, **fields)
    job = engine.next_job()
    time.sleep(0.2)
    job.emit(Token("A"))
    for _ in range(8):
        time.sleep(0.02)
        job.emit(Token())
    job.emit(Token("B", finish_reason="stop"))
    _, body = answer(connection)
    before, after = re.split('"(?:text|delta)": *"A"', body)
    assert said in before.replace('": "', '":"')
    assert said in after.replace('": "', '":"')


def test_a_count_takes_another_method(send):
    status, body = answer(send("/v1/messages/count_tokens"))
    assert status == 405 and "which takes POST" in body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["time", "mistake", "end", "failure", "memory"])
def test_waiting_ends_with_an_error(api, loading, send, tiny, monkeypatch, stream, reason):
    max_waiting_bytes = 0 if reason == "memory" else 1 << 20
    monkeypatch.setattr(completions, "_MAX_WAITING_BYTES", max_waiting_bytes)
    api.flags.load_wait = 0.1 if reason == "time" else 60
    connection = send(prompt="x", stream=stream, temperature=5)
    while reason in ("mistake", "failure", "end") and not api.n_waiting_bytes:
        time.sleep(0.01)
    if reason == "mistake":
        loading.set_result([tiny])
    if reason == "failure":
        loading.set_exception(ValueError("damaged"))
    if reason == "end":
        api.end_answers(SHUTTING_DOWN)
    status, body = answer(connection)
    *_, last = body.strip().splitlines()
    message = json.loads(last.removeprefix("data: "))["error"]["message"]
    expected = {"mistake": "temperature is 5", "end": SHUTTING_DOWN, "failure": "cannot be loaded"}
    assert expected.get(reason, "is being loaded") in message
    if stream:
        # The answer has begun by then.
        assert status == 200
    elif reason == "mistake":
        assert status == 400
    else:
        assert status == 503
    assert api.n_waiting_bytes == 0


def test_bodies_that_wait_have_a_limit_for_those_that_come(
    engine, api, loading, send, tiny, monkeypatch
):
    first = send(prompt="x")
    until = time.monotonic() + 20
    while not api.n_waiting_bytes:
        assert time.monotonic() < until
        time.sleep(0.01)
    monkeypatch.setattr(completions, "_MAX_WAITING_BYTES", api.n_waiting_bytes)
    assert answer(send(prompt="y"))[0] == 503
    loading.set_result([tiny])
    engine.next_job().emit(Token("A", finish_reason="stop"))
    assert answer(first)[0] == 200


def test_a_client_that_leaves_waits_no_longer(api, loading, send):
    connections = [send(prompt="x", stream=stream) for stream in (False, True)]
    until = time.monotonic() + 20
    while not api.n_waiting_bytes and time.monotonic() < until:
        time.sleep(0.01)
    for connection in connections:
        connection.sock.close()
    while api.n_waiting_bytes:
        assert time.monotonic() < until
        time.sleep(0.01)
    # Nobody has cancelled the loading.
    assert loading.set_running_or_notify_cancel()


@pytest.mark.parametrize(
    "path, named",
    [
        ("/v1/responses/resp_1", "send the whole conversation to /v1/responses"),
        ("/v1/responses/compact", "send the whole conversation to /v1/responses"),
        ("/v1/messages/batches", "send each message to /v1/messages"),
        ("/api/chat", "this server's address with /v1"),
        ("/api/tags", "this server's address with /v1"),
    ],
)
def test_other_apis_name_what_serves_them(send, path, named):
    for body in ({}, {"model": "x"}):
        status, text = answer(send(path, **body))
        message = json.loads(text)["error"]["message"]
        assert status == 404 and message.startswith(f"{path} is not served here")
        assert named in message


def test_a_wrong_path_or_method_is_told_what_is_served(send):
    """Neither sends anybody to a page that pip does not install."""
    status, text = answer(send("/v1/embeddings"))
    message = json.loads(text)["error"]["message"]
    assert status == 404
    assert message.startswith("There is nothing at /v1/embeddings: ")
    assert "/v1/chat/completions" in message and "/v1/models" in message
    status, text = answer(send("/v1/models", model="x"))
    message = json.loads(text)["error"]["message"]
    assert (status, message) == (405, "POST is not for /v1/models, which takes GET and HEAD.")


@pytest.mark.parametrize("stream", [False, True])
def test_clients_learn_that_the_server_ends(api, engine, send, stream):
    connection = send(prompt="x", stream=stream)
    job = engine.next_job()
    if stream:
        job.emit(Token("A"))
    api.end_answers(SHUTTING_DOWN)
    for ended in (connection, send()):
        status, body = answer(ended)
        *_, last = body.strip().splitlines()
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["message"], error["type"]) == (SHUTTING_DOWN, "server_error")
        if stream and ended is connection:
            # Its answer had begun.
            assert status == 200
        else:
            assert status == 503
    assert job.ended


def test_an_answer_that_fails_is_an_error(engine, send):
    failed = "The answer has failed: see the server's log."
    for error, status, message in (
        (ApiError("No such form.", "regex"), 400, "No such form."),
        (RuntimeError("secret"), 500, failed),
        (KeyboardInterrupt(), 500, failed),
    ):
        connection = send()
        engine.next_job().emit(error)
        code, body = answer(connection)
        assert (code, json.loads(body)["error"]["message"]) == (status, message)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_computed_for_a_client_that_has_left(engine, send, stream):
    """Whatever it has sent before: here, the line end of a careless client."""
    connection = send(prompt="x", stream=stream, n=2)
    jobs = [engine.next_job() for _ in range(2)]
    connection.sock.sendall(b"\r\n")
    connection.sock.close()
    until = time.monotonic() + 20
    while not all(job.ended for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_fields_without_effect_are_named_once_in_the_log(engine, send, caplog):
    caplog.set_level("INFO", "mlx_flashhead.serving.completions")
    for fields in ({"store": True}, {"store": True, "user": "me"}, {"user": None, "a\nb" * 50: 1}):
        connection = send(prompt="x", **fields)
        engine.next_job().emit(Token("A", finish_reason="stop"))
        assert answer(connection)[0] == 200
    # A client fills logs with them.
    made_up = {f"x{i:03}": 1 for i in range(300)}
    for fields in (made_up, made_up):
        connection = send(prompt="x", **fields)
        engine.next_job().emit(Token("A", finish_reason="stop"))
        answer(connection)
    named = [record.args[0] for record in caplog.records if "completions" in record.name]
    assert named[:3] == ["store", "user", ("a\\nb" * 50)[:53]]
    assert len(named) == 4 and named[3].count(",") == 96


def test_a_reading_that_runs_out_of_something_ends(send, monkeypatch):
    """A future cannot hold a StopIteration: the client would wait for ever."""
    monkeypatch.setattr(completions, "read_jobs", lambda *_, **__: next(iter(())))
    status, body = answer(send())
    assert status == 500 and "The server has failed" in body


def test_a_stream_says_how_it_was_decoded(engine, send):
    for fields, decoding in (({}, "verified"), ({"dense": True}, "dense: as requested")):
        connection = send(prompt="x", stream=True, **fields)
        engine.next_job().emit(Token("A", finish_reason="stop"))
        assert f": decoding {decoding}\n\ndata: [DONE]\n\n" in answer(connection)[1]
