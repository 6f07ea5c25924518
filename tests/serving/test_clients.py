"""Requests as the clients of docs/server.md send them: each gets what the table there says."""

import json
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLIENTS = [json.loads(path.read_text()) for path in sorted(TESTS.glob("data/clients/*.json"))]
PAGE = (TESTS.parent / "docs" / "server.md").read_text()


def events(text):
    """The JSON of server-sent events; fails unless the stream is complete."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "" and blocks.pop() == "data: [DONE]"
    assert all(block.startswith((":", "data: ")) for block in blocks)
    return [json.loads(block[6:]) for block in blocks if block.startswith("data: ")]


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


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client["client"])
def test_a_client_gets_what_the_table_says(http_server, client):
    name = client["client"]
    gets = client["gets"]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    assert f"| {gets} |" in row
    assert client["sources"]
    for request in client["requests"]:
        body = request["body"]
        wanted = request["answer"]
        host, _, port = http_server.url.removeprefix("http://").partition(":")
        headers = {"Authorization": f"Bearer {http_server.token}", **request["headers"]}
        sent = None if body is None else json.dumps(body)
        with closing(HTTPConnection(host, int(port), timeout=60)) as connection:
            connection.request(request["method"], request["path"], sent, headers)
            response = connection.getresponse()
            text = response.read().decode()
        assert response.status == wanted["status"], text
        if wanted["status"] != 200:
            assert wanted["names"] in json.loads(text)["error"]["message"]
        elif body is not None and body.get("stream"):
            check_stream(text, wanted)
        elif body is not None:
            assert json.loads(text)["choices"][0]["finish_reason"] in ("stop", "length")
        else:
            assert "chain" in [model["id"] for model in json.loads(text)["data"]]
        for field in wanted.get("ignored", ()):
            assert field in http_server.log()


def test_the_table_has_the_clients(http_server):
    """A field without effect is named once, however many clients send it."""
    assert len(CLIENTS) == 10
    named = [line for line in http_server.log().splitlines() if "named once: " in line]
    fields = [field for line in named for field in line.partition("named once: ")[2].split(", ")]
    assert len(fields) == len(set(fields))
