"""Checked descriptions of a text: a JSON schema, a regular expression or a Lark grammar.

llguidance reads them. Unsupported parts are errors, so none is ignored silently.
"""

import argparse
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.guarded import Guard, GuardError
from .schemas import Document
from .vocabulary import llguidance

# Earley items of one mask: large schemas need up to 10,000. llguidance's default takes seconds.
LIMITS: dict[str, Any] = {"step_max_items": 10_000, "verbose_errors": False}
# Clients send the same grammars again: the problem is kept of those of so many characters, or less.
MAX_KEPT = 200_000
# Bytes without a choice at a text's beginning: each mask looks at all of them.
MAX_FORCED = 10_000
# The character 0 and its spellings. mlx-lm's detokenizers write it as another one.
_ZERO = re.compile(r"\x00|\\(x00|u0000|U00000000|[xuU]\{0+\})")
# What is found in llguidance's messages, and what they say.
_SENTENCES = (
    (r"Unimplemented keys: \[(.*)\]", r"\1 is not supported"),
    (
        "oneOf constraints",
        '"oneOf" of schemas that are not told apart is not supported: use "anyOf"',
    ),
    ("Too many items", "it is too ambiguous to be followed: simplify it"),
    ("too large|fuel exhausted|too many expr", "it is too large to be followed: simplify it"),
    ("recursion limit exceeded", "it is nested too deeply: simplify it"),
    ("'multipleOf' has too many digits", '"multipleOf" has too many digits: take a rounder number'),
    ("NoExtension", "no text fits it: check that it can end"),
    (r"^\s*error: (.+)", r"\1"),
    (r"\A(?:at )?\d+\(\d+\): *(?:failed to compile JSON schema: )?(.*?)[.:]?$", r"\1"),
)
_GUARD = Guard(Path(__file__).with_name("grammar_check.py"))


@dataclass(frozen=True)
class Grammar:
    """A checked description of a text. What makes one raises a ValueError if it is wrong.

    Attributes:
        form: What describes it: "JSON schema", "regular expression" or "grammar".
        source: One of llguidance's grammars, as JSON.
    """

    form: str
    source: str

    @classmethod
    def from_json_schema(cls, schema: dict | bool) -> "Grammar":
        """JSON of a schema, which must be satisfiable and use supported keys alone.

        Raises:
            ValueError: If the schema is wrong, or has a key that llguidance does not follow.
        """
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            remedy = 'it must be an object such as {"type": "object"}'
            raise ValueError(f"The JSON schema is {schema!r:.60}: {remedy}.")
        try:
            document = Document(schema)
            whole = document.by_itself(document.root)
            source = json.dumps({"name": "form", "json_schema": whole})
        except RecursionError:
            raise ValueError(
                "The JSON schema is wrong: it is nested too deeply: simplify it."
            ) from None
        except ValueError as error:
            raise ValueError(f"The JSON schema is wrong: {error}.") from None
        return cls._checked("JSON schema", source)

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`.

        Raises:
            ValueError: If the expression is wrong.
        """
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"The regular expression is {pattern!r:.60}: it must be a text.")
        if _ZERO.search(pattern):
            raise ValueError(
                f"The regular expression {pattern!r:.60} holds the character 0, which no text has "
                "here: leave it out."
            )
        lark = f"start: /{llguidance().regex_to_lark(pattern, '')}/"
        source = json.dumps({"name": "form", "lark_grammar": lark})
        return cls._checked("regular expression", source, f" {pattern!r:.60}", _place_in(pattern))

    @classmethod
    def from_lark(cls, text: str) -> "Grammar":
        """Text that a Lark grammar derives from ``start``, in llguidance's dialect of Lark.

        Raises:
            ValueError: If the grammar is wrong.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The grammar is {text!r:.60}: it must be a text in Lark's form.")
        return cls._checked("grammar", json.dumps({"name": "form", "lark_grammar": text}))

    @classmethod
    def _checked(cls, form: str, source: str, shown: str = "", where: str = "") -> "Grammar":
        problem = first_problem(source)
        if problem is None:
            return cls(form, source)
        _, objection = problem
        found = re.match(r"(?:at )?(\d+)\((\d+)\)", objection)
        if found and form == "grammar":
            where = f" at line {found[1]}, column {found[2]}"
        raise ValueError(f"The {form}{shown} is wrong{where}: {sentence(objection)}.")


def top_level(*sources: str) -> str:
    """Grammars as llguidance takes them; the first one may refer to the others."""
    return f'{{"grammars": [{", ".join(sources)}]}}'


def first_problem(*sources: str) -> tuple[int, str] | None:
    """The number of the first grammar that is wrong, and llguidance's objection to it.

    The number is -1 if all of them take too much time or memory. A helper process finds it, since
    some grammars take all of a stack, or of the memory. It is kept for texts that are not long.
    """
    if sum(map(len, sources)) > MAX_KEPT:
        return _known_problem.__wrapped__(*sources)
    return _known_problem(*sources)


@lru_cache(64)
def _known_problem(*sources: str) -> tuple[int, str] | None:
    grammars = [top_level(source) for source in sources]
    request = {"grammars": grammars, "limits": LIMITS, "forced": MAX_FORCED}
    try:
        found = _GUARD.call(request)
    except (GuardError, RuntimeError) as error:
        return -1, f"it {error}: simplify it"
    if found is None:
        return None
    number, objection = found
    return number, objection


def sentence(problem: str) -> str:
    """What llguidance's message of several lines says, without its full stop."""
    problem = problem.replace("/$defs/root", "")
    for pattern, said in _SENTENCES:
        found = re.search(pattern, problem, re.MULTILINE)
        if found:
            return found.expand(said)
    return problem.strip().partition("\n")[0].rstrip(".:")


def _place_in(pattern: str) -> str:
    """Says where a regular expression is wrong, as far as Python's own parser finds it."""
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
    group.add_argument(
        "--json-schema",
        metavar="FILE or JSON",
        help="Write JSON that this JSON schema allows.",
    )
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
    if args.json_schema is not None:
        return _of_schema(args.json_schema)
    if args.grammar is not None:
        return _of_file(args.grammar)
    return None


def _of_file(name: str) -> Grammar:
    """The Lark grammar in a file."""
    try:
        return Grammar.from_lark(_text_of(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _of_schema(given: str) -> Grammar:
    """The JSON schema that is given, or that is in a file."""
    where = given
    text = given
    try:
        if given.lstrip().startswith("{"):
            where = "--json-schema"
        else:
            text = _text_of(given)
        return Grammar.from_json_schema(json.loads(text))
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not JSON ({problem}): give a schema.") from None
    except FileNotFoundError:
        remedy = """give one that exists, or the schema itself, such as '{"type": "object"}'"""
        raise ValueError(f"--json-schema: there is no file {given:.60}: {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _text_of(name: str) -> str:
    return Path(name).expanduser().read_text(encoding="utf-8")
