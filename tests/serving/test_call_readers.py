"""Calls that a model has written are read beside the event loop, and addresses take turns."""

import json
from contextlib import ExitStack
from http.client import HTTPConnection
from threading import Event

import pytest

from engines import flags
from mlx_flashhead.serving import completions
from mlx_flashhead.serving.access import Access
from mlx_flashhead.serving.answer_text import Token
from mlx_flashhead.serving.endpoints import Api
from mlx_flashhead.serving.serve import Server
from scripted_server import running
from test_endpoints import PlayedEngine

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '{"name": "weather", "arguments": {}}'


@pytest.fixture
def engine(chain):
    engine = PlayedEngine()
    engine.models.set_result([chain])
    engine.status = "ok"
    return engine


@pytest.fixture
def send(engine):
    """A function that sends a request: (path, fields or None) → the connection."""
    router = Api(flags(), engine).router()
    with running(Server(router, Access())) as port, ExitStack() as opened:

        def send(path, fields=None):
            connection = HTTPConnection("127.0.0.1", port, timeout=20)
            opened.callback(connection.close)
            if fields is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(fields))
            return connection

        yield send


def test_nobody_waits_while_a_call_is_read(monkeypatch, engine, send):
    begun = Event()
    go = Event()

    def read(tokenizer, text, tools):
        begun.set()
        assert go.wait(20)
        return [json.loads(text)]

    monkeypatch.setattr(completions, "read_tool_calls", read)
    messages = [{"role": "user", "content": "Rome?"}]
    asked = send("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    engine.next_job().emit(Token(calls=[CALL], finish_reason="stop"))
    assert begun.wait(20)
    other = send("/v1/chat/completions", {"messages": messages})
    engine.next_job().emit(Token(content="Yes.", finish_reason="stop"))
    assert json.loads(other.getresponse().read())["choices"][0]["message"]["content"] == "Yes."
    assert send("/health").getresponse().status == 200
    go.set()
    (choice,) = json.loads(asked.getresponse().read())["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_a_call_that_takes_too_long_is_text(monkeypatch, engine, send):
    def read(tokenizer, text, tools):
        raise ValueError("A call takes more than 5 seconds.")

    monkeypatch.setattr(completions, "read_tool_calls", read)
    messages = [{"role": "user", "content": "Rome?"}]
    asked = send("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    engine.next_job().emit(Token(content="So: ", calls=[CALL], finish_reason="stop"))
    (choice,) = json.loads(asked.getresponse().read())["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (f"So: {CALL}", "stop")
