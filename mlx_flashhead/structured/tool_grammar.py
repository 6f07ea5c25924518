"""The grammar of a model's calls, in the format of its chat template, and of a text with them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .call_format import CallFormat, Tool, calling
from .grammar import MAX_KEPT, Grammar, first_problem, sentence, top_level
from .lark import LarkRules, any_of, one_of, quoted
from .schemas import MAX_CHARACTERS
from .tool_formats import CALL_FORMATS, format_name_of
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
    format_name = format_name_of(tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    text = json.dumps([_tool(tool) for tool in tools])
    if len(text) > MAX_KEPT:
        return _calls(format_name, vocabulary, text, several)
    return _known_calls(format_name, vocabulary, text, several)


def _calls(format_name: str, vocabulary: Vocabulary, tools: str, several: bool) -> ToolCalls:
    """The calls of tools, whose names and parameters are JSON."""
    call_format = CALL_FORMATS[format_name]
    read = [Tool(name, parameters) for name, parameters in json.loads(tools)]
    if sum(tool.n_characters for tool in read) > MAX_CHARACTERS:
        raise ValueError(
            f"The tools have more than {MAX_CHARACTERS:,} characters with what they refer to: give "
            "fewer, or simplify them."
        )
    _check(read, [json.dumps({"json_schema": tool.schema}) for tool in read])
    # What is no schema is not taken apart.
    rules = LarkRules(vocabulary.special)
    section = call_format.section_of(read, rules, several=several)
    whole = _without_tokens(call_format, read, several=several)
    if first_problem(whole) is not None:
        _check(read, [_without_tokens(call_format, [tool], several=several) for tool in read])
        _check([], [whole])
    source = json.dumps({"name": "calls", "lark_grammar": rules.text(section)})
    return ToolCalls(call_format.start, source, goes_on=several and bool(call_format.end))


# A client sends the same tools again.
_known_calls = lru_cache(16)(_calls)


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
    call_format = CALL_FORMATS[format_name_of(tokenizer)]
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
    if parameters is None:
        parameters = {}
    return function["name"], parameters


def text_grammar(
    vocabulary: Vocabulary,
    form: Grammar | None,
    calls: ToolCalls | None,
    *,
    required: bool = False,
    thought: tuple[str, str] | None = None,
) -> str:
    """Makes the grammars of a text for llguidance, as JSON.

    Without a form, and where no call is required, the text is free between its calls. Otherwise it
    is in the form, or has calls and nothing else. In a thought before that a call may come, too.

    Args:
        vocabulary: The tokens.
        form: What the whole text follows.
        calls: What calls look like.
        required: Whether the text must be a call.
        thought: The marks of a thought that may come first. It must come if the first mark is
            empty: the prompt has begun it.
    """
    sources = [each.source for each in (form, calls) if each is not None]
    if calls is None and thought is None:
        return top_level(*sources)
    rules = LarkRules(vocabulary.special)
    if calls is not None and form is None and not required:
        start = _text_with_calls(vocabulary, rules, calls)
    else:
        start = _text_in_form(vocabulary, rules, form, calls, thought)
    return top_level(json.dumps({"lark_grammar": rules.text(start)}), *sources)


def _text_with_calls(vocabulary: Vocabulary, rules: LarkRules, calls: ToolCalls) -> str:
    """A Lark expression of free text in which calls may stand."""
    text = _free_text(vocabulary, rules, [calls.start])
    section = f"{_until(calls.start, text, rules)} @calls"
    if calls.goes_on:
        return f"({section})* {text}"
    return f"{section} | {text}"


def _text_in_form(
    vocabulary: Vocabulary,
    rules: LarkRules,
    form: Grammar | None,
    calls: ToolCalls | None,
    thought: tuple[str, str] | None,
) -> str:
    """A Lark expression of a form, or of calls and nothing else, perhaps after a thought."""
    bodies = []
    if form is not None:
        bodies.append("@form")
    further = ""
    if calls is not None:
        section = f"PADDING? {rules.expression(calls.start)} @calls"
        if calls.goes_on:
            further = f"({section})*"
        bodies.append(f"{section} {further}")
    body = one_of(bodies)
    if thought is None:
        return body
    begin, end = thought
    texts = []
    opening = ""
    # Without a beginning the thought must come.
    if begin:
        texts.append(body)
        opening = f"PADDING? {rules.expression(begin)}"
    marks = [end]
    if calls is not None:
        marks.append(calls.start)
    free = _free_text(vocabulary, rules, marks)
    texts.append(f"{opening} {_until(end, free, rules)} {body}")
    if calls is not None:
        texts.append(f"{opening} {_until(calls.start, free, rules)} @calls {further}")
    return one_of(texts)


def _free_text(vocabulary: Vocabulary, rules: LarkRules, marks: Sequence[str]) -> str:
    """A Lark expression of free text without some marks, in whatever tokens they are written."""
    any_text = rules.rule("/(?s:.*)/", "T")
    # The rests of the marks that begin with a special token.
    rests: dict[int, list[str]] = {}
    for mark in marks:
        first, *rest = rules.parts(mark)
        if first in rules.special:
            rests.setdefault(rules.special[first], []).append("".join(rest[:1]))
    marking = {*vocabulary.end_tokens, *rests}
    parts = []
    others = [str(token) for token in vocabulary.other_than_text if token not in marking]
    if others:
        parts.append(f"<[{','.join(others)}]> {any_text}?")
    for token, texts in rests.items():
        # Such a token may come, if the rest of the mark does not.
        if all(texts):
            unlike = rules.rule(f"{any_text} & ~/{any_of(texts)}/", "T")
            parts.append(f"<[{token}]> {unlike}?")
    if not parts:
        return f"{any_text}?"
    return f"{any_text}? ({one_of(parts)})*"


def _until(mark: str, text: str, rules: LarkRules) -> str:
    """A Lark expression of a free text and a mark that ends it."""
    endings = [rules.rule(f"/(?s:.*){quoted(mark)}/", attributes="[lazy]")]
    if rules.parts(mark)[0] in rules.special:
        endings.append(rules.expression(mark))
    return f"{text} {one_of(endings)}"
