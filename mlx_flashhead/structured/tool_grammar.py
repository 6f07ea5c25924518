"""The grammar of a model's calls, in the format of its chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .call_format import CallFormat, Tool, calling
from .grammar import first_problem, sentence
from .lark import LarkRules
from .tool_formats import FORMATS, format_name_of
from .vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class ToolCalls:
    """What calls of tools look like.

    Attributes:
        start: The mark that begins a section of calls.
        source: The rest of a section, one of llguidance's grammars, as JSON.
        goes_on: Whether text, or another section, may follow a section.
    """

    start: str
    source: str
    goes_on: bool


def tool_calls(
    tokenizer: Any, tools: Sequence[Mapping[str, Any]], *, several: bool = True
) -> ToolCalls:
    """The calls of some tools, as a model writes them.

    Each text of these grammars becomes, by mlx-lm's parser for the model, calls whose names are
    those of tools and whose arguments follow their schemas. The parser must see the tools as
    :func:`tools_for_parser` returns them.

    Args:
        tokenizer: mlx-lm's, with a tool parser.
        tools: In OpenAI's form, ``{"type": "function", "function": {"name": …, "parameters": …}}``.
        several: Whether a text may have more than one call.

    Raises:
        ValueError: If the model's format is not known, or cannot carry one of the tools, or a
            schema has a part that is not followed. It names the tool.
    """
    text = json.dumps([_tool(tool) for tool in tools])
    return _calls(format_name_of(tokenizer), vocabulary_of(tokenizer), text, several)


@lru_cache(16)
def _calls(format_name: str, vocabulary: Vocabulary, tools: str, several: bool) -> ToolCalls:
    """The calls of tools, whose names and parameters are JSON: a client sends the same again."""
    call_format = FORMATS[format_name]
    read = [Tool(name, parameters) for name, parameters in json.loads(tools)]
    _check(read, [json.dumps({"json_schema": tool.schema}) for tool in read])
    rules = LarkRules(vocabulary.special)  # what is no schema is not taken apart
    section = call_format.section_of(read, rules, several=several)
    whole = _without_tokens(call_format, read, several=several)
    if first_problem(whole) is not None:
        _check(read, [_without_tokens(call_format, [tool], several=several) for tool in read])
        _check([], [whole])
    source = json.dumps({"name": "calls", "lark_grammar": rules.text(section)})
    return ToolCalls(call_format.start, source, goes_on=several and bool(call_format.end))


def _without_tokens(call_format: CallFormat, tools: Sequence[Tool], *, several: bool) -> str:
    """The grammar of calls for the check, which has no tokens but bytes."""
    rules = LarkRules({})
    section = call_format.section_of(tools, rules, several=several)
    mark = rules.expression(call_format.start)
    return json.dumps({"lark_grammar": rules.text(f"{mark} {section}")})


def _check(tools: Sequence[Tool], sources: Sequence[str]) -> None:
    """Raises a ValueError if a grammar is wrong, with the name of its tool."""
    problem = first_problem(*sources)
    if problem is None:
        return
    number, text = problem
    if not 0 <= number < len(tools):
        raise ValueError(f"The tools are too much for a grammar: {sentence(text)}.")
    with calling(tools[number].name):
        raise ValueError(sentence(text))


def tools_for_parser(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools with types that mlx-lm's parser reads: it knows neither references nor unions."""
    call_format = FORMATS[format_name_of(tokenizer)]
    views = []
    for tool in tools:
        read = Tool(*_tool(tool))
        with calling(read.name):
            view = {**tool["function"], "parameters": call_format.view(read)}
        views.append({"type": "function", "function": view})
    return views


def _tool(tool: Mapping[str, Any]) -> tuple[str, Any]:
    """A tool's name and parameters."""
    function = tool["function"]
    parameters = function.get("parameters")
    return function["name"], {} if parameters is None else parameters
