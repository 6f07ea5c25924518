"""Checked descriptions of a text: a JSON schema, a regular expression or a Lark grammar.

llguidance reads them. It refuses unsupported parts, so none is ignored silently.
"""

import json
import re
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

from ..common.command import from_extra

# Between the tokens of JSON: nothing, a space, or a new line with an indentation. The limit keeps
# small models from endless spaces.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ ]{0,24})?"}
# The character 0 and its spellings. mlx-lm's detokenizers write it as another one.
_ZERO = re.compile(r"\x00|\\(x00|u0000|U00000000|[xuU]\{0+\})")
# Schemas that the search for the place of an error compiles, each of which may take milliseconds.
MAX_COMPILED = 100


class GrammarError(ValueError):
    """A wrong schema, expression or grammar; the message names the place."""


@dataclass(frozen=True)
class Grammar:
    """A checked description of a text."""

    kind: str  # "JSON schema", "regular expression" or "grammar"
    compiled: str  # llguidance's own form of it

    @classmethod
    def from_json_schema(cls, schema: dict | bool) -> "Grammar":
        """JSON of a schema. ``{"type": "object"}`` stands for any JSON object.

        Raises:
            GrammarError: If the schema is wrong, unsatisfiable or uses an unsupported key.
        """
        if not isinstance(schema, dict | bool):
            form = 'it must be an object such as {"type": "object"}'
            raise GrammarError(f"The JSON schema is {_shown(schema)}: {form}.")
        if schema is False:
            raise GrammarError("The JSON schema is false, which no text fits: give an object.")
        schema = {} if schema is True else schema
        place = ""
        try:
            compiled, problem = _compile_schema(schema)
            if problem:
                place, problem = _place(schema, problem)
        except RecursionError:
            problem = "it is nested too deeply"
        if problem:
            raise GrammarError(f"The JSON schema is wrong at {place or 'its top'}: {problem}.")
        return cls("JSON schema", compiled)

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole, in the syntax of Rust's regex crate.

        Raises:
            GrammarError: If the expression is wrong.
        """
        if not isinstance(pattern, str) or not pattern:
            raise GrammarError(f"The regular expression is {_shown(pattern)}: it must be a text.")
        if _ZERO.search(pattern):
            zero = "the character 0, which no text has here"
            expression = f"The regular expression {_shown(pattern)}"
            raise GrammarError(f"{expression} holds {zero}: leave it out.")
        compiled = llguidance().LLMatcher.grammar_from_regex(pattern)
        if problem := _problem(compiled):
            error = re.search(r"error: ([^\n]+)", problem)
            reason = error[1] if error else _sentence(problem)
            raise GrammarError(f"The regular expression {pattern!r} is wrong: {reason}.")
        return cls("regular expression", compiled)

    @classmethod
    def from_lark(cls, text: str) -> "Grammar":
        """Text that a Lark grammar derives from ``start``, in llguidance's dialect of Lark.

        Raises:
            GrammarError: If the grammar is wrong.
        """
        if not isinstance(text, str) or not text.strip():
            raise GrammarError(f"The grammar is {_shown(text)}: it must be a text in Lark's form.")
        compiled = llguidance().LLMatcher.grammar_from_lark(text)
        if problem := _problem(compiled):
            where = ""
            if place := re.match(r"(?:at )?(\d+)\((\d+)\): *(.*)", problem, re.DOTALL):
                where, problem = f" at line {place[1]}, column {place[2]}", place[3]
            raise GrammarError(f"The grammar is wrong{where}: {_sentence(problem)}.")
        return cls("grammar", compiled)


def llguidance(submodule: str = "") -> ModuleType:
    """llguidance or one of its modules; a ValueError that names its extra if it is absent."""
    name = f"llguidance.{submodule}" if submodule else "llguidance"
    return from_extra(name, "structured", "Structured output")


def _problem(compiled: str) -> str:
    """llguidance's objection to a grammar; empty if there is none."""
    is_error, messages = llguidance().LLMatcher.validate_grammar_with_warnings(compiled)
    return messages[0] if is_error else ""


def _compile_schema(schema: dict) -> tuple[str, str]:
    """llguidance's form of the schema, and its objection."""
    compile_json = llguidance().LLMatcher.grammar_from_json_schema
    try:
        compiled = compile_json(json.dumps(schema), defaults=_JSON_OPTIONS)
    except ValueError as error:
        return "", str(error)
    return compiled, _problem(compiled)


def _place(schema: dict, problem: str) -> tuple[str, str]:
    """The place of the problem in the schema, as a JSON pointer, and the problem as a sentence.

    llguidance does not give the place. A part of the schema is the cause if the problem is gone
    without it. The search goes on within that part, and ends after MAX_COMPILED schemas.
    """
    root = json.loads(json.dumps(schema))
    place, here, left = "", root, MAX_COMPILED
    while True:
        items = [*(here.items() if isinstance(here, dict) else enumerate(here))]
        parts = [(key, part) for key, part in items if isinstance(part, dict | list)]
        for key, part in islice(parts, left):
            left -= 1
            here[key] = True
            gone = _compile_schema(root)[1] != problem
            here[key] = part
            if gone:
                place += "/" + str(key).replace("~", "~0").replace("/", "~1")
                here = part
                break
        else:
            return place, _sentence(problem)


def _sentence(problem: str) -> str:
    """The first line of a message, without its full stop."""
    if unsupported := re.match(r"Unimplemented keys: \[(.*)\]", problem):
        return f"{unsupported[1]} is not supported"
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    if lines and lines[0].startswith("regex parse error"):
        lines = [f"no regular expression, {lines[-1].removeprefix('error: ')}"]
    return lines[0].rstrip(".:") if lines else "it cannot be followed"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
