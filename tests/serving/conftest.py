"""Tiny models for the server's tests."""

import re
import socket
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection

import pytest

from always_guessing import guess_always
from chain_models import write_chain_model
from engines import CHUNK, convert, flags, served_model
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.stages import Reading
from scripted_server import TOKEN, scripted_server
from server_process import serving

CALL = '{"name": "weather", "arguments": {"city": "Rome", "limit": 5}}'
WORDS = ("<tool_call>", CALL, "</tool_call>", " one", " two", " three", " four")


@pytest.fixture(scope="session")
def scripted():
    """Port and script of a server whose answers a test writes."""
    with scripted_server() as running:
        yield running


@pytest.fixture
def server(scripted):
    """The same, with nothing written yet: on this machine alone."""
    scripted[1].reset()
    return scripted


@pytest.fixture
def script(server):
    """What the server says, and what it has seen."""
    return server[1]


@pytest.fixture
def ask(server):
    """A function that makes a request: (path, method, body, headers) → response, its body."""

    def ask(path, method="GET", body=None, **headers):
        with closing(HTTPConnection("127.0.0.1", server[0], timeout=20)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response, response.read()

    return ask


@pytest.fixture
def connect(server):
    """A function that opens a connection, and sends on it."""
    with ExitStack() as opened:

        def connect(data=b""):
            address = "127.0.0.1", server[0]
            connection = opened.enter_context(socket.create_connection(address, timeout=20))
            connection.sendall(data)
            return connection

        yield connect


@pytest.fixture(scope="session")
def chain_model(tmp_path_factory):
    """A checkpoint that calls a tool in a chat, and counts to four after the text "a"."""
    dense = tmp_path_factory.mktemp("chain") / "dense"
    chains = [" ", *WORDS[:3]], ["a", *WORDS[3:]]
    return convert(write_chain_model(dense, *chains, words=WORDS), "chain", n_probes=2)


@pytest.fixture(scope="session")
def http_server(converted, chain_model, tmp_path_factory):
    """A server in a process of its own, of the random model; another one is allowed by name."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN)
    with serving(
        folder,
        *("--model", converted, "--served-model-name", "mine", "--max-tokens", 40),
        *("--allow-models", chain_model, "--lan", "--token-file", folder / "token"),
    ) as server:
        yield replace(server, token=TOKEN, url=re.sub("//.*:", "//127.0.0.1:", server.url))


@pytest.fixture(scope="session")
def tiny(converted):
    """The random model as the server has it."""
    return served_model(converted)


@pytest.fixture(scope="session")
def chain(chain_model):
    """The counting model as the server has it."""
    return served_model(chain_model)


@pytest.fixture(scope="session")
def start_engine(converted):
    """A context with an engine that ends in time, of the random model if no other is named."""

    @contextmanager
    def started(*arguments, folder=converted, drafts=False):
        def load():
            served = served_model(folder, context=100_000)
            if drafts:
                served.draft_model = served_model(folder).model
                served.batchable = False
            return [served]

        engine = Engine(load, flags("--prefill-step-size", CHUNK, *arguments))
        with pytest.MonkeyPatch.context() as patch:
            if drafts:
                guess_always(patch)
            try:
                engine.models.result(60)
                yield engine
            finally:
                assert engine.close(60)

    return started


@pytest.fixture
def start(start_engine):
    """A function that starts an engine: (flags) → engine."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(start_engine(*arguments))


@pytest.fixture(scope="session")
def engine(start_engine):
    """An engine that tests share: what it has read of a prompt, it keeps."""
    with start_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def drafting(start_engine):
    """One whose model drafts for itself. As long as it lives, all models guess always."""
    with start_engine(drafts=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def flash(tiny):
    """``(model, tokenizer)`` of the random model, in this process."""
    return tiny.model, tiny.tokenizer


@pytest.fixture
def chunks(monkeypatch):
    """(thread-safe) list of the chunks that are read, each of which takes a moment."""
    read = []
    compute = Reading._compute

    def slow(self, tokens):
        read.append((self.job, tokens.size))
        time.sleep(0.02)
        compute(self, tokens)

    monkeypatch.setattr(Reading, "_compute", slow)
    return read
