"""A mixed load of one server: what is compared, and what is counted."""

import json
from pathlib import Path

import pytest

import mixed_load
from mixed_load import Answer, Text, read_stream, read_whole

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_a_stream_and_a_whole_answer_are_one_answer():
    """Ids, which are new in each, do not count."""
    first = {"role": "assistant", "content": "One ", "reasoning": "So", "tool_calls": [CALL]}
    usage = {"completion_tokens": 9}
    chunks = [
        {"choices": [{"index": 1, "delta": {"content": "x"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {**first, "content": "One"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": " "}, "finish_reason": "tool_calls"}]},
        {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    lines = [b": prompt 1/1\n", *(f"data: {json.dumps(c)}\n".encode() for c in chunks)]
    other = {"index": 1, "message": {"content": "x"}, "finish_reason": "stop"}
    chosen = {"index": 0, "message": first | {"id": 1}, "finish_reason": "tool_calls"}
    whole = read_whole({"choices": [other, chosen], "usage": usage})
    assert read_stream([*lines, b"data: [DONE]\n"]) == whole
    called = Text("One ", "So", (("f", "{}"),), "tool_calls")
    assert whole == Answer((called, Text("x", "", (), "stop")), 9)
    with pytest.raises(ValueError, match="without its usage"):
        read_stream(lines[:-1])
    with pytest.raises(ValueError, match="failed"):
        read_stream([*lines, b'data: {"error": {"message": "failed"}}\n'])


class Log:
    def log(self):
        return ["a line", "Traceback (most recent call last):"]

    port = 0
    pid = 0


@pytest.fixture
def load(monkeypatch):
    """A load of a server that a test plays, by `answers`: kind → what asking does."""
    made = mixed_load.MixedLoad(Log(), "played", 3, 8)
    made.answers = {}
    right = Answer((Text("right", "", (), "stop"),), 2)

    def ask(port, question, *, stream, patience=None):
        beside_others = bool(made._alone) and question in made._alone
        result = right
        if beside_others or stream:
            result = made.answers.get(question.kind, right)
        if question.kind == "tools":
            raise mixed_load.RefusedError("no tools here")
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(mixed_load, "ask", ask)
    monkeypatch.setattr(mixed_load, "get", lambda port, path: '{"data": [{"id": "m"}]}')
    monkeypatch.setattr(mixed_load, "CHATS", {kind: {} for kind in ("greedy", "n", "XTC", "tools")})
    return made


def test_answers_are_compared_with_those_alone(load):
    other = Answer((Text("other", "", (), "stop"),), 2)
    load.answers = {"n": other, "XTC": mixed_load.HungUpError(), "texts": ValueError("500: lost")}
    load.ask_alone()
    load.ask_together(0.2)
    result = load.figures()
    kinds = result["kinds"]
    assert kinds["greedy"]["answered"] == kinds["greedy"]["as_alone"] > 0
    assert kinds["n"]["answered"] > kinds["n"]["as_alone"] == 0
    assert result["hung_up"] > 0 and result["lost"] > 0 and "XTC" not in kinds
    assert result["problems"][0] == "m, texts: 500: lost"
    assert result["differences"][0] == {
        "model": "m",
        "kind": "n",
        "alone": ["right"],
        "beside_others": ["other"],
    }
    assert result["left_out"] == {"m, tools": "no tools here"} and result["tracebacks"] == 1
    caption = mixed_load.make_table(result).caption
    assert "Left out: m, tools: no tools here" in caption and "Differs: m, n" in caption


def test_a_server_that_answers_nothing_is_one_sentence(load, monkeypatch):
    def fail(*_, **__):
        raise ValueError("500: failed")

    monkeypatch.setattr(mixed_load, "ask", fail)
    with pytest.raises(ValueError, match="No question was answered: m, greedy: 500: failed"):
        load.ask_alone()


def test_a_server_is_put_under_load(run, converted, monkeypatch, tmp_path):
    kinds = ("greedy", "top-p", "n", "penalties", "regex")
    chats = {kind: mixed_load.CHATS[kind] for kind in kinds}
    monkeypatch.setattr(mixed_load, "CHATS", chats)
    monkeypatch.setattr(mixed_load, "LENGTHS", (0, 1))
    monkeypatch.setattr(mixed_load, "MINUTE", 0.5)
    file = tmp_path / "mixed.json"
    flags = ("--minutes", 1, "--clients", 4, "--tokens", 8)
    code, out, _ = run(mixed_load, converted, *flags, "--json", file)
    assert code == 0 and "answered" in out
    (result,) = json.loads(file.read_text())["results"]
    assert result["models"] == [Path(converted).name] and result["clients"] == 4
    assert result["as_alone"] == result["answered"] > 0
    assert result["lost"] == result["tracebacks"] == 0
    assert set(result["kinds"]) <= {*chats, "texts", "texts, drawn"}


def test_kv_bits_are_a_server_of_their_own():
    several, quantized = mixed_load.servers(["a", "b", "c"], 8).values()
    assert several[-3:] == ["--allow-models", "b", "c"]
    assert quantized[-4:] == ["--kv-bits", "8", "--quantized-kv-start", "0"]
    assert "--allow-models" not in quantized
