"""Requests as the clients of docs/server.md send them: each gets what the table there says."""

import json
from contextlib import closing
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

import pytest

from chain_models import write_chain_model
from engines import checked
from mlx_flashhead.serving import messages, responses
from server_process import serving

TESTS = Path(__file__).parents[1]
CLIENTS = [json.loads(path.read_text()) for path in sorted(TESTS.glob("data/clients/*.json"))]
PAGE = (TESTS.parent / "docs" / "server.md").read_text()


def events(text):
    """The JSON of server-sent events; fails unless the stream is complete."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "" and blocks.pop() == "data: [DONE]"
    assert all(block.startswith((":", "data: ")) for block in blocks)
    return [json.loads(block[6:]) for block in blocks if block.startswith("data: ")]


def named_events(text):
    """The JSON of events with names; fails unless each has its own."""
    found = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def check_blocks(text, sent):
    """A message of Anthropic's."""
    stop = sent["answer"]["stop"]
    if not sent["body"].get("stream"):
        assert json.loads(text)["stop_reason"] == stop
        return
    first, *_, ended, last = named_events(text)
    assert (first["type"], last["type"]) == ("message_start", "message_stop")
    assert ended["delta"]["stop_reason"] == stop


def check_items(text, sent):
    """A response of OpenAI's."""
    stop = sent["answer"]["stop"]
    if not sent["body"].get("stream"):
        assert json.loads(text)["status"] == stop
        return
    first, *_, last = named_events(text)
    assert (first["type"], last["type"]) == ("response.created", f"response.{stop}")


def check_stream(text, wanted):
    *chunks, last = events(text)
    if wanted.get("usage"):
        assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    else:
        chunks.append(last)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length", "tool_calls")
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    if "delta" in choices[0]:
        assert choices[0]["delta"]["role"] == "assistant"


@pytest.fixture(scope="module")
def agents_server(tmp_path_factory):
    """A server of a model that says one word. Clients have other names for it."""
    folder = tmp_path_factory.mktemp("agents")
    options = {"words": (" one",), "context": 16_384}
    model = write_chain_model(folder / "talker", [" ", " one"], **options)
    with serving(folder, "--model", model) as server:
        yield server


def answer_to(server, sent):
    """(status, body) of the answer to a recorded request."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    headers = {"Authorization": f"Bearer {server.token}", **sent["headers"]}
    if sent["body"] is None:
        body = None
    else:
        body = json.dumps(sent["body"])
    with closing(HTTPConnection(host, int(port.strip("/")), timeout=60)) as connection:
        connection.request(sent["method"], sent["path"], body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def check(text, sent):
    """Checks the answer to a request that is answered."""
    wanted = sent["answer"]
    if sent["body"] is None:
        assert "chain" in [model["id"] for model in json.loads(text)["data"]]
    elif wanted.get("counts"):
        assert json.loads(text)["input_tokens"] > 10
    elif sent["path"].startswith("/v1/messages"):
        check_blocks(text, sent)
    elif sent["path"].startswith("/v1/responses"):
        check_items(text, sent)
    elif sent["body"].get("stream"):
        check_stream(text, wanted)
    else:
        assert json.loads(text)["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client["client"])
def test_a_client_gets_what_the_table_says(request, client):
    # Agents name models of their own.
    if "any_model" in client:
        server = request.getfixturevalue("agents_server")
    else:
        server = request.getfixturevalue("http_server")
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {client['client']} |")]
    assert f"| {client['gets']} |" in rows[-1]
    assert client["sources"]
    for sent in client["requests"]:
        wanted = sent["answer"]
        status, text = answer_to(server, sent)
        assert status == wanted["status"], text
        if status == 200:
            check(text, sent)
        else:
            assert wanted["names"] in json.loads(text)["error"]["message"]
        for field in wanted.get("ignored", ()):
            assert field in server.log()


AGENTS = [client for client in CLIENTS if "tools" in client]


@pytest.mark.parametrize("client", AGENTS, ids=lambda client: client["client"])
def test_every_tool_of_an_agent_can_be_called(chain, client):
    """Their schemas can be followed. A turn begins as the last one began."""
    chat_fields = {"Claude Code": messages.chat_fields, "Codex": responses.chat_fields}
    turns = [chat_fields[client["client"]](sent["body"]) for sent in client["requests"][:3]]
    every = chat_fields[client["client"]](
        client["requests"][0]["body"] | {"tools": client["tools"]}
    )
    tools = checked(chain, every, any_model=True).tools
    names = [tool["function"]["name"] for tool in every["tools"]]
    assert all(name in tools.calls.source for name in names) and len(names) > 8
    for last, turn in pairwise(turn["messages"] for turn in turns):
        assert turn[: len(last)] == last
        assert [message["role"] for message in turn[len(last) :]] == ["assistant", "tool"]


def test_the_table_has_the_clients(http_server):
    """A field without effect is named once, however many clients send it."""
    assert len(CLIENTS) == 12
    named = [line for line in http_server.log().splitlines() if "named once: " in line]
    fields = [field for line in named for field in line.partition("named once: ")[2].split(", ")]
    assert len(fields) == len(set(fields))
