"""Checked descriptions of a text: a JSON schema, a regular expression or a Lark grammar.

llguidance reads them. Unsupported parts are errors, so none is ignored silently.
"""

import argparse
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..common.guarded import Guard, GuardError
from .vocabulary import llguidance

# Between the tokens of JSON: nothing, a space, or a new line with an indentation. The limit keeps
# small models from endless spaces.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ ]{0,24})?"}
# The character 0 and its spellings. mlx-lm's detokenizers write it as another one.
_ZERO = re.compile(r"\x00|\\(x00|u0000|U00000000|[xuU]\{0+\})")
# Rules of a grammar and references of a schema. llguidance calls itself for each of a chain.
MAX_RULES = 1000
_RULE = re.compile(r'^[ \t]*[?!]?\w+[^\n:"/]*:|"\$ref"', re.MULTILINE)
_TOKEN = re.compile(r"<\[\d+\]>")  # of a special token, in a grammar
_GUARD = Guard(Path(__file__).with_name("grammar_check.py"))
FORM_OF_CALLS = "form of calls"


@dataclass(frozen=True)
class Grammar:
    """A checked description of a text. What makes one raises a ValueError if it is wrong."""

    kind: str  # "JSON schema", "regular expression", "grammar" or "form of calls"
    compiled: str  # in llguidance's form

    @classmethod
    def from_json_schema(cls, schema: dict | bool) -> "Grammar":
        """JSON of a schema, which must be satisfiable and use supported keys alone.

        Raises:
            ValueError: If the schema is wrong, or has a key that llguidance does not follow.
        """
        if not isinstance(schema, dict) and schema is not True:
            form = 'it must be an object such as {"type": "object"}'
            raise ValueError(f"The JSON schema is {schema!r:.60}: {form}.")
        compile_json = llguidance().LLMatcher.grammar_from_json_schema
        try:
            text = json.dumps({} if schema is True else schema)
            compiled = compile_json(text, defaults=_JSON_OPTIONS)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"The JSON schema is wrong: {_sentence(str(error))}.") from None
        return cls._checked("JSON schema", compiled)

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`.

        Raises:
            ValueError: If the expression is wrong.
        """
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"The regular expression is {pattern!r:.60}: it must be a text.")
        if _ZERO.search(pattern):
            zero = "holds the character 0, which no text has here"
            raise ValueError(f"The regular expression {pattern!r:.60} {zero}: leave it out.")
        compiled = llguidance().LLMatcher.grammar_from_regex(pattern)
        place = _place_in(pattern)
        return cls._checked("regular expression", compiled, f" {pattern!r:.60}", place)

    @classmethod
    def from_lark(cls, text: str) -> "Grammar":
        """Text that a Lark grammar derives from ``start``, in llguidance's dialect of Lark.

        Raises:
            ValueError: If the grammar is wrong, or has more than 1,000 rules.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The grammar is {text!r:.60}: it must be a text in Lark's form.")
        return cls._checked("grammar", llguidance().LLMatcher.grammar_from_lark(text))

    @classmethod
    def from_rules(cls, text: str) -> "Grammar":
        """A Lark grammar that this package has put together, of as many rules as it takes.

        Raises:
            ValueError: If compiling it takes too much time or memory.
        """
        # llguidance's check has no tokens but bytes
        problem = _problem_of(_TOKEN.sub('"token"', text))
        if problem:
            raise ValueError(f"The tools are too much for a grammar: {_sentence(problem)}.")
        return cls(FORM_OF_CALLS, llguidance().LLMatcher.grammar_from_lark(text))

    @classmethod
    def _checked(
        cls, kind: str, compiled: str, shown: str = "", where: str | None = None
    ) -> "Grammar":
        problem = _problem(compiled)
        if not problem:
            return cls(kind, compiled)
        place = re.match(r"(?:at )?(\d+)\((\d+)\): *(.*)", problem, re.DOTALL)
        if place:
            if where is None:
                where = f" at line {place[1]}, column {place[2]}"
            problem = place[3]
        raise ValueError(f"The {kind}{shown} is wrong{where or ''}: {_sentence(problem)}.")


@dataclass(frozen=True)
class ToolCalls:
    """What a text with calls of tools looks like.

    Attributes:
        start: The mark from which a call is followed, wherever it comes.
        section: One section of calls, with the mark at its beginning as plain text.
        only: Sections as the whole of a text, one or as many as there may be.
        several: Whether a text may have several calls.
        is_closed: Whether a section has a mark at its end, after which text may go on.
    """

    start: str
    section: Grammar
    only: Grammar
    several: bool
    is_closed: bool


def _place_in(pattern: str) -> str:
    """Says where a regular expression is wrong, as far as Python's own parser finds it.

    llguidance tells a place in the grammar that it makes of the expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        return f" at column {error.colno}"
    except (RecursionError, OverflowError):
        pass
    return ""


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json-schema``, ``--regex`` and ``--grammar``, which exclude each other."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    schema = "Write JSON that the JSON schema in this file allows."
    group.add_argument("--json-schema", metavar="FILE", help=schema)
    group.add_argument("--regex", help="Write text that this regular expression matches.")
    group.add_argument(
        "--grammar", metavar="FILE", help="Write text that the Lark grammar in this file allows."
    )


def grammar_of(args: argparse.Namespace) -> Grammar | None:
    """Returns the description of the text; None without any of the options.

    Raises:
        ValueError: If the description is not right.
    """
    if args.regex is not None:
        return Grammar.from_regex(args.regex)
    path = args.grammar if args.json_schema is None else args.json_schema
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if args.json_schema is None:
            return Grammar.from_lark(text)
        return Grammar.from_json_schema(json.loads(text))
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not JSON ({where}): give a file with a schema.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _problem(compiled: str) -> str:
    """Returns llguidance's objection to a grammar of somebody else; empty if there is none."""
    n_rules = len(_RULE.findall(compiled))
    if n_rules > MAX_RULES:
        most = f"at most {MAX_RULES:,} are followed: simplify it"
        return f"it has {n_rules:,} rules and references, and {most}"
    return _problem_of(compiled)


@lru_cache(64)
def _problem_of(compiled: str) -> str:
    """Returns llguidance's objection to a grammar; empty if there is none.

    A helper process runs it, since some grammars take all of a stack, or of the memory.
    """
    try:
        return _GUARD.call(compiled)
    except (GuardError, RuntimeError) as error:
        return f"it {error}: simplify it"


def _sentence(problem: str) -> str:
    """What a message of several lines says, without its full stop."""
    if unsupported := re.match(r"Unimplemented keys: \[(.*)\]", problem):
        return f"{unsupported[1]} is not supported"
    if cause := re.search(r"^\s*error: (.+)", problem, re.MULTILINE):
        return cause[1]
    return problem.strip().partition("\n")[0].rstrip(".:")
