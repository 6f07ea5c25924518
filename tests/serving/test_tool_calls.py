"""The tools of a request: which may be called, and that every call follows its schema."""

import json

import jsonschema
import pytest

from call_formats import of, tool
from chain_models import write_chain_model
from engines import checked, served_model, whole_answer
from mlx_flashhead.models.call_parsers import read_tool_calls
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.jobs import read_jobs
from mlx_flashhead.serving.server_options import make_parser

MESSAGES = [{"role": "user", "content": "One day"}]
WEATHER = tool(
    "weather",
    of(["city", "unit"], city={"type": "string", "maxLength": 8}, unit={"enum": ["C", "F", 7]}),
)
PING = tool("ping", {"type": "object", "properties": {}})
TOOLS = [WEATHER, PING]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
# Of spaces, lines and digits: calls of a model that knows nothing are long.
SHORT = {str(token): -9 for token in (200, 222, *range(17, 27))}
ANSWER = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
ANSWER["additionalProperties"] = False
RESPONSE = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that knows nothing, whose template has tools."""
    marks = ("<tool_call>", "</tool_call>")
    return write_chain_model(tmp_path_factory.mktemp("tools") / "random", words=marks)


@pytest.fixture(scope="module")
def random(folder):
    return served_model(folder)


@pytest.fixture(scope="module")
def engine(start_engine, folder):
    with start_engine(folder=folder) as engine:
        yield engine


def chosen(served, **fields):
    """What may be called, and whether a call is required."""
    tools = checked(served, {"messages": MESSAGES, "tools": TOOLS} | fields).tools
    if tools.calls is None:
        return None
    names = [name for name in SCHEMAS if name in tools.calls.source]
    return names, tools.required


def named(name):
    return {"type": "function", "function": {"name": name}}


def test_a_choice_says_which_tools_may_be_called(random):
    every = ["weather", "ping"]
    assert chosen(random) == chosen(random, tool_choice="auto") == (every, False)
    assert chosen(random, tool_choice="required") == (every, True)
    assert chosen(random, tool_choice="any") == (every, True)
    assert chosen(random, tool_choice=named("ping")) == (["ping"], True)
    allowed = {"mode": "auto", "tools": [named("weather")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert chosen(random, tool_choice=choice) == (["weather"], False)
    assert chosen(random, tool_choice="none") is None
    assert chosen(random, tools=[], tool_choice="auto") is None
    # the template shows them all
    request = checked(random, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": named("ping")})
    assert request.tools.offered == TOOLS


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"tool_choice": named("rain")}, "must name some of the tools: weather, ping"),
        ({"tool_choice": {"type": "allowed_tools"}}, "must name some of the tools"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [PING, PING]}, r"tools\[1\] has the name of another tool"),
        ({"tools": [tool("f", 5)]}, "must be a JSON schema"),
        ({"tools": [tool("f", {"properties": 5})]}, "'f' cannot be called: properties must be"),
        ({"tools": [tool("f", {"properties": {"a": {"not": {}}}})]}, "'f'.*\"not\" is not supp"),
        ({"tools": [tool("f", {"description": "a" * 400_000})]}, "longer than 400,000 characters"),
    ],
)
def test_what_cannot_be_followed_is_said(random, fields, said):
    with pytest.raises(ApiError, match=said) as refused:
        checked(random, {"messages": MESSAGES, "tools": TOOLS} | fields)
    assert refused.value.field in ("tools", "tool_choice") and refused.value.status == 400


def test_without_llguidance_calls_are_free_unless_one_is_required(random, monkeypatch):
    def absent(tokenizer):
        raise ValueError("Structured output needs llguidance")

    monkeypatch.setattr("mlx_flashhead.serving.tool_calls.vocabulary_of", absent)
    tools = checked(random, {"messages": MESSAGES, "tools": TOOLS}).tools
    assert (tools.offered, tools.for_parser, tools.calls) == (TOOLS, TOOLS, None)
    with pytest.raises(ApiError, match="needs llguidance"):
        chosen(random, tool_choice="required")


def answers(engine, **fields):
    """The answers to a request, each with its calls as mlx-lm's parser reads them."""
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 250, "temperature": 1, "seed": 3}
    body["logit_bias"] = SHORT
    (served,) = engine.models.result()
    flags = make_parser().parse_args(["--model", "model"])
    jobs = read_jobs(body | fields, chat=True, models=[served], flags=flags)
    engine.submit(jobs)
    found = []
    for job in jobs:
        answer = whole_answer(job)
        parse = job.request.tools.for_parser
        answer.calls = [
            call for text in answer.calls for call in read_tool_calls(served.tokenizer, text, parse)
        ]
        found.append(answer)
    return found


def check(call):
    jsonschema.validate(call["arguments"], SCHEMAS[call["name"]])


@pytest.mark.parametrize("by_dense_head", [False, True])
def test_required_calls_are_valid_at_temperature_1(engine, by_dense_head):
    found = answers(engine, n=3, tool_choice="required", dense=by_dense_head)
    whole = [answer for answer in found if answer.finish_reason == "stop"]
    assert whole
    for answer in whole:
        assert answer.calls and not answer.content.strip()
    for answer in found:
        for call in answer.calls:
            check(call)


def test_one_call_where_one_is_wanted(engine):
    wanted = {"tool_choice": named("weather"), "parallel_tool_calls": False}
    for answer in answers(engine, n=2, **wanted):
        (call,) = answer.calls
        assert (call["name"], answer.finish_reason) == ("weather", "stop")
        check(call)


def test_a_response_format_beside_tools_is_json_or_a_call(engine):
    wanted = {"response_format": RESPONSE}
    kinds = set()
    # The mark of a call is never drawn, or always.
    for bias in (-100, 100):
        biases = SHORT | {"258": bias}
        for answer in answers(engine, n=2, logit_bias=biases, **wanted):
            if answer.calls:
                check(answer.calls[0])
            elif answer.finish_reason == "stop":
                jsonschema.validate(json.loads(answer.content), ANSWER)
            kinds.add(bool(answer.calls))
    assert kinds == {False, True}


def test_a_call_that_is_cut_off_is_none(engine):
    for answer in answers(engine, n=2, tool_choice=named("weather"), max_tokens=20):
        assert (answer.finish_reason, answer.calls) == ("length", [])
        assert answer.content
