"""The grammar of a model's calls, in the format of its chat template."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .call_format import Tool
from .dialects import FormatMarks
from .grammar import Grammar, ToolCalls
from .lark import literal
from .tool_formats import FORMATS, format_name_of
from .vocabulary import Vocabulary, vocabulary_of


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
    call_format = FORMATS[format_name](FormatMarks(vocabulary.special))
    read = [Tool(name, parameters) for name, parameters in json.loads(tools)]
    section = call_format.section(read, several=several)
    start = call_format.start
    # the mark at the beginning is plain text here: whoever follows the text has seen it
    one = call_format.rules.text(f"{literal(start)} {section}")
    # without forcing, which allows one way alone to cut what must follow into tokens
    one = '%llguidance {"no_forcing": true}\n' + one
    again = "(PADDING? section)*" if several and call_format.end else ""
    many = call_format.rules.text(f"PADDING? section {again}")
    first = call_format.marks.expression(start)
    many += f"section: {first} {section}\nPADDING: /[ \\n]{{1,3}}/\n"
    return ToolCalls(
        start=start,
        section=Grammar.from_rules(one),
        only=Grammar.from_rules(many),
        several=several,
        is_closed=bool(call_format.end),
    )


def tools_for_parser(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools with types that mlx-lm's parser reads: it knows neither references nor unions."""
    call_format = FORMATS[format_name_of(tokenizer)](FormatMarks({}))
    views = []
    for tool in tools:
        parameters = call_format.view(Tool(*_tool(tool)))
        function = {**tool["function"], "parameters": parameters}
        views.append({"type": "function", "function": function})
    return views


def _tool(tool: Mapping[str, Any]) -> tuple[str, Any]:
    """A tool's name and parameters."""
    function = tool["function"]
    parameters = function.get("parameters")
    return function["name"], {} if parameters is None else parameters
