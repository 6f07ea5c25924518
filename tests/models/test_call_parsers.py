"""Tool calls in models' own words: what mlx-lm's parsers make of them, within limits."""

from importlib import import_module
from types import SimpleNamespace

import pytest

from mlx_flashhead.common.guarded import Guard
from mlx_flashhead.models import call_parsers
from mlx_flashhead.models.call_parsers import read_tool_calls

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


def tokenizer_of(parser):
    module = import_module(f"mlx_lm.tool_parsers.{parser}")
    return SimpleNamespace(tool_parser=module.parse_tool_call)


@pytest.mark.parametrize(
    "parser, text",
    [
        ("json_tools", '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'),
        ("pythonic", '[weather(city="Rome", days=2)]'),
        ("gemma4", 'call:weather{city:<|"|>Rome<|"|>,days:2}'),
        ("glm47", "weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>"),
        ("laguna", "weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>"),
        ("qwen3_coder", "<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>"),
        ("minimax_m2", '<invoke name="weather"><parameter name="city">Rome</parameter></invoke>'),
    ],
)
def test_calls_are_those_of_the_parser(parser, text):
    tokenizer = tokenizer_of(parser)
    expected = tokenizer.tool_parser(text, TOOLS)
    if not isinstance(expected, list):
        expected = [expected]
    (call,) = read_tool_calls(tokenizer, text, TOOLS)
    assert call == expected[0]
    assert call["arguments"]["city"] == "Rome"


def test_several_calls_and_parsers_of_others():
    text = '[weather(city="Rome"), weather(city="Oslo")]'
    calls = read_tool_calls(tokenizer_of("pythonic"), text, [])
    assert [call["arguments"]["city"] for call in calls] == ["Rome", "Oslo"]
    others = SimpleNamespace(tool_parser=lambda text, tools: {"name": text, "arguments": {}})
    assert read_tool_calls(others, "f", []) == [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize(
    "parser, text, said",
    [
        # The parser's time is quadratic.
        ("gemma4", "call:f{" * 20_000, "takes more than 0.3 seconds"),
        ("json_tools", "no call", "is no call"),
        ("json_tools", "x" * (call_parsers.MAX_CHARACTERS + 1), "is too long"),
    ],
    ids=range(3),
)
def test_what_is_no_call_or_takes_too_much(monkeypatch, parser, text, said):
    monkeypatch.setattr(call_parsers, "_GUARD", Guard(call_parsers._GUARD.path, seconds=0.3))
    with pytest.raises(ValueError, match=said):
        read_tool_calls(tokenizer_of(parser), text, TOOLS)
