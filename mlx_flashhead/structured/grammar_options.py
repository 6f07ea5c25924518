"""The arguments of a command that writes structured output."""

import argparse
import json
from pathlib import Path

from .grammar import Grammar, GrammarError


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json-schema``, ``--regex`` and ``--grammar``, which exclude each other."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", metavar="FILE", help="Write JSON that the JSON schema in this file allows."
    )
    group.add_argument("--regex", help="Write text that this regular expression matches.")
    group.add_argument(
        "--grammar", metavar="FILE", help="Write text that the Lark grammar in this file allows."
    )


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
