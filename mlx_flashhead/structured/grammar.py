"""Checked descriptions of a text: a JSON schema, a regular expression or a Lark grammar.

llguidance reads them. Unsupported parts are errors, so none is ignored silently.
"""

import argparse
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.command import from_extra
from ..common.guarded import Guard, GuardError

# Between the tokens of JSON: nothing, a space, or a new line with an indentation. The limit keeps
# small models from endless spaces.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ ]{0,24})?"}
# The character 0 and its spellings. mlx-lm's detokenizers write it as another one.
_ZERO = re.compile(r"\x00|\\(x00|u0000|U00000000|[xuU]\{0+\})")
# Rules of a grammar and references of a schema. llguidance calls itself for each of a chain.
MAX_RULES = 1000
_RULE = re.compile(r'^[ \t]*[?!]?\w+[^\n:"/]*:|"\$ref"', re.MULTILINE)
_GUARD = Guard(Path(__file__).with_name("grammar_check.py"))


class GrammarError(ValueError):
    """A wrong schema, expression or grammar; the message says what is wrong in it."""


@dataclass(frozen=True)
class Grammar:
    """A checked description of a text."""

    kind: str  # "JSON schema", "regular expression" or "grammar"
    compiled: str  # in llguidance's form

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
        compile_json = llguidance().LLMatcher.grammar_from_json_schema
        try:
            text = json.dumps({} if schema is True else schema)
            compiled = compile_json(text, defaults=_JSON_OPTIONS)
            problem = _problem(compiled)
        except RecursionError:
            problem = "it is nested too deeply"
        except ValueError as error:
            problem = str(error)
        if problem:
            raise GrammarError(f"The JSON schema is wrong: {_sentence(problem)}.")
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
            zero = "holds the character 0, which no text has here"
            raise GrammarError(f"The regular expression {_shown(pattern)} {zero}: leave it out.")
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


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json-schema``, ``--regex`` and ``--grammar``, which exclude each other."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    json_schema = "Write JSON that the JSON schema in this file allows."
    group.add_argument("--json-schema", metavar="FILE", help=json_schema)
    group.add_argument("--regex", help="Write text that this regular expression matches.")
    grammar = "Write text that the Lark grammar in this file allows."
    group.add_argument("--grammar", metavar="FILE", help=grammar)


def grammar_of(args: argparse.Namespace) -> Grammar | None:
    """The description of the text, if it is right; None without any of the options."""
    try:
        if args.json_schema is not None:
            return Grammar.from_json_schema(_json(args.json_schema))
        if args.regex is not None:
            return Grammar.from_regex(args.regex)
        if args.grammar is not None:
            return Grammar.from_lark(_text("--grammar", args.grammar))
    except GrammarError as error:
        path = args.json_schema or args.grammar
        raise GrammarError(f"{path}: {error}" if path else str(error)) from None
    return None


def llguidance(submodule: str = "") -> ModuleType:
    """llguidance or one of its modules; a ValueError that names its extra if it is absent."""
    name = f"llguidance.{submodule}" if submodule else "llguidance"
    return from_extra(name, "structured", "Structured output")


@lru_cache(64)
def _problem(compiled: str) -> str:
    """llguidance's objection to a grammar; empty if there is none. A helper process asks it, since
    some grammars take all of a stack, or of the memory."""
    llguidance()
    n_rules = sum(1 for _ in _RULE.finditer(compiled))
    if n_rules > MAX_RULES:
        most = f"at most {MAX_RULES:,} are followed: simplify it"
        return f"it has {n_rules:,} rules and references, and {most}"
    try:
        return _GUARD.call(compiled)
    except (GuardError, RuntimeError) as error:
        return f"it {error}: simplify it"


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


def _text(option: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{option} {path} is not UTF-8 text: check the file.") from None
    except OSError as error:
        reason = f"{option} {path} cannot be read ({error.strerror}): check the path."
        raise ValueError(reason) from None


def _json(path: str) -> dict | bool:
    try:
        return json.loads(_text("--json-schema", path))
    except RecursionError:
        reason = "is nested too deeply: simplify it."
    except json.JSONDecodeError as error:
        reason = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
    raise ValueError(f"--json-schema {path} {reason}")
