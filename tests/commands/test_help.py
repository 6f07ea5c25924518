"""What ``--help`` and the pages say of the flags: their defaults are the code's, and each command
line of a page is one that its command takes."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mlx_flashhead import run
from mlx_flashhead.__main__ import COMMANDS
from mlx_flashhead.common import flags
from mlx_flashhead.conversion.options import ConvertOptions
from mlx_flashhead.decoding import policy
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.models import finer_head
from mlx_flashhead.serving import server_options

CHECKOUT = Path(__file__).parents[2]
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *CHECKOUT.glob("docs/*.md")]
SAID = re.compile(r"\(default:? ([^)]*)\)")
# Defaults that a parser leaves open, since the code beneath it has them.
BENEATH = {
    "--max-wait": policy.MAX_WAIT,
    "--head-bits": finer_head.DEFAULT_BITS,
    "--host": server_options.LOCAL,
}


def parser_of(name):
    if name == "server":
        module = server_options
    else:
        module = importlib.import_module(f"mlx_flashhead.{name}")
    return module.make_parser()


def all_parsers():
    """The parsers of all commands and their subcommands, by name."""
    found = {}
    for name in COMMANDS:
        parser = parser_of(name)
        found[name] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{name} {what}": each for what, each in action.choices.items()}
    return found


ACTIONS = [
    pytest.param(name, action, id=f"{name} {action.option_strings[0]}")
    for name, parser in all_parsers().items()
    for action in parser._actions
    if action.option_strings and action.help not in (None, argparse.SUPPRESS)
]


def said_default(action, text):
    """The default in a text, as the flag's parser would read it; None where it is no value."""
    match = SAID.search(text)
    if match is None:
        return None
    word = match[1].partition(", which")[0]
    try:
        if action.type:
            return action.type(word)
        return word
    except (argparse.ArgumentTypeError, ValueError, KeyError):
        # The default is words, such as "the model's".
        return None


def has_no_default(action):
    """Whether a parser leaves the value open, or it is a switch that is off."""
    value = action.default
    return value is None or value is False or value in ((), [], {}, argparse.SUPPRESS)


@pytest.mark.parametrize("name, action", ACTIONS)
def test_the_default_in_a_help_is_the_codes(name, action):
    text = action.help % {"default": action.default, "prog": name}
    said = said_default(action, text)
    flag = action.option_strings[0]
    if not has_no_default(action):
        if isinstance(action.default, tuple):
            default = list(action.default)
        else:
            default = action.default
        read = default
        if action.type and isinstance(default, str):
            read = action.type(default)
        assert said in (default, read, str(default)), f"{name} {flag}: {text}"
    elif flag in BENEATH and said is not None:
        assert said == BENEATH[flag]
    else:
        no_figure = not isinstance(said, int | float | list)
        assert no_figure, f"{flag} of {name} has {said}, which no test compares"


def test_the_defaults_of_the_ground_floor_are_those_beneath():
    assert flags.MAX_WAIT == policy.MAX_WAIT
    assert HeadOptions.head_bits is None and ConvertOptions.head_bits is None


def command_lines():
    """(page, command line) of each code block."""
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?mlx_flashhead[. ](\w+)(.*)", line)
                if match and match[1] in COMMANDS and "…" not in line:
                    words = shlex.split(match[2], comments=True)
                    yield pytest.param(match[1], words, id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("name, words", [*command_lines()])
def test_a_command_line_of_a_page_is_taken(name, words, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    parser = parser_of(name)
    if name == "run":
        words = run._split(parser, words)
    parser.parse_args(words)


def defaults_in_tables():
    """(page, flag, text) of each row of a table that names a flag's default."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\| `(--[a-z-]+)[^`]*` \|(.*default.*)\|", line)
            if match:
                yield pytest.param(match[1], match[2], id=f"{page.name} {match[1]}")


@pytest.mark.parametrize("flag, text", [*defaults_in_tables()])
def test_a_default_in_a_table_of_a_page_is_the_codes(flag, text):
    having = [parser for parser in all_parsers().values() if flag in parser._option_string_actions]
    actions = [parser._option_string_actions[flag] for parser in having]
    assert any(said_default(action, text) == action.default for action in actions), text
