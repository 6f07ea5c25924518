"""A mixed load of one server: what is compared, and what is counted."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_flashhead.benchmarks import mixed_benchmark as mixed
from mlx_flashhead.benchmarks.mixed_benchmark import Answer, Text, read_stream, read_whole

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

    port = pid = 0


@pytest.fixture
def load(monkeypatch):
    """A load of a server that a test plays, by `answers`: kind → what asking does."""
    made = mixed.MixedLoad(Log(), "played", 3, 8)
    made.answers = {}
    right = Answer((Text("right", "", (), "stop"),), 2)

    def ask(port, question, *, stream, patience=None):
        beside_others = bool(made._alone) and question in made._alone
        result = made.answers.get(question.kind, right) if beside_others or stream else right
        if question.kind == "tools":
            raise mixed.RefusedError("no tools here")
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(mixed, "ask", ask)
    monkeypatch.setattr(mixed, "get", lambda port, path: '{"data": [{"id": "m"}]}')
    monkeypatch.setattr(mixed, "CHATS", {kind: {} for kind in ("greedy", "n", "XTC", "tools")})
    monkeypatch.setattr(mixed, "ROUND_SECONDS", 0.2)
    monkeypatch.setattr(mixed, "PROBE_SECONDS", 0.01)
    return made


def test_answers_are_compared_with_those_alone(load):
    other = Answer((Text("other", "", (), "stop"),), 2)
    load.answers = {"n": other, "XTC": mixed.HungUpError(), "texts": ValueError("500: lost")}
    load.take_round(0)
    seconds = load.take_round(1)
    result = load.figures({"mixed": [seconds]})
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
    assert result["health_worst_seconds"] is not None
    caption = mixed.make_table(result).caption
    assert "Left out: m, tools: no tools here" in caption and "Differs: m, n" in caption


def test_a_server_that_answers_nothing_is_one_sentence(load, monkeypatch):
    def fail(*_, **__):
        raise ValueError("500: failed")

    monkeypatch.setattr(mixed, "ask", fail)
    with pytest.raises(ValueError, match="No question was answered: m, greedy: 500: failed"):
        load.take_round(0)


def test_the_command_puts_a_server_under_load(run, converted, monkeypatch, tmp_path):
    chats = {kind: mixed.CHATS[kind] for kind in ("greedy", "top-p", "n", "penalties", "regex")}
    monkeypatch.setattr(mixed, "CHATS", chats)
    monkeypatch.setattr(mixed, "LENGTHS", (0, 1))
    monkeypatch.setattr(mixed, "ROUND_SECONDS", 0.5)
    file = tmp_path / "mixed.json"
    flags = ("--mixed", "--model", converted, "--minutes", 1, "--clients", 4, "--tokens", 8)
    code, out, _ = run("benchmark", "server", *flags, "--report", file)
    assert code == 0 and "answered" in out
    report = json.loads(file.read_text())
    (result,) = report["results"]
    assert report["kind"] == "server" and "--mixed" in report["command"]
    assert result["models"] == [Path(converted).name] and result["clients"] == 4
    assert result["as_alone"] == result["answered"] > 0
    assert result["lost"] == result["tracebacks"] == 0
    assert set(result["kinds"]) <= {*chats, "texts", "texts, drawn"}


def test_kv_bits_are_a_server_of_their_own(monkeypatch):
    started = []

    class Serving(SimpleNamespace):
        def __enter__(self):
            return Log()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(mixed, "serving", lambda *flags: started.append(flags) or Serving())
    monkeypatch.setattr(mixed, "resolve", lambda model: model)
    args = SimpleNamespace(
        model="a", allow_models=["b", "c"], kv_bits=8, clients=(2, 16), tokens=None,
        n_probes=None, flash_head=None, no_build=True,
    )  # fmt: skip
    assert len([*mixed.cases(args)]) == 4
    (_, *mixed_flags), (_, *quantized) = started
    assert mixed_flags[-3:] == ["--allow-models", "b", "c"]
    assert quantized[-4:] == ["--kv-bits", "8", "--quantized-kv-start", "0"]
    assert "--allow-models" not in quantized
