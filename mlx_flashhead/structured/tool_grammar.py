"""The grammar of a model's calls, in the format of its chat template."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .dialects import FormatMarks
from .grammar import Grammar, ToolCalls
from .lark import literal
from .tool_formats import Tool, format_of
from .vocabulary import vocabulary_of


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
    read = tuple(_tool(tool) for tool in tools)
    call_format = format_of(tokenizer)(FormatMarks(vocabulary_of(tokenizer).special))
    section = call_format.section(read, several=several)
    start = call_format.start
    # the mark at the beginning is plain text here: whoever follows the text has seen it
    one = call_format.rules.text(f"{literal(start)} {section}")
    again = "(PADDING? section)*" if several and call_format.end else ""
    many = call_format.rules.text(f"PADDING? section {again}")
    first = call_format.marks.expression(start)
    many += f"section: {first} {section}\nPADDING: /[ \\n]{{1,3}}/\n"
    return ToolCalls(
        start=start,
        section=_compiled(one),
        only=_compiled(many),
        several=several,
        is_closed=bool(call_format.end),
    )


def tools_for_parser(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools with types that mlx-lm's parser reads: it knows neither references nor unions."""
    call_format = format_of(tokenizer)(FormatMarks({}))
    views = []
    for tool in tools:
        function = {**tool["function"], "parameters": call_format.view(_tool(tool))}
        views.append({"type": "function", "function": function})
    return views


def _tool(tool: Mapping[str, Any]) -> Tool:
    function = tool["function"]
    parameters = function.get("parameters")
    return Tool(function["name"], {} if parameters is None else parameters)


@lru_cache(64)
def _compiled(text: str) -> Grammar:
    return Grammar.from_rules(text)
