"""Arguments of the commands: types that check a value, and a parser with errors of one sentence."""

import difflib
import math
import os
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import msgspec

from .command import from_extra

# Takes a value from the command line or from Python, or raises an ArgumentTypeError.
Type = Callable[[Any], Any]
PICTURES = (".png", ".svg", ".pdf", ".jpg")
# A word in an error has so many characters at most.
LONGEST_SHOWN = 60
_REQUIRED = "the following arguments are required"


class Parser(ArgumentParser):
    """A parser whose error is one sentence, without the usage before it.

    ``example`` is a command line that an error shows where an argument is missing.
    """

    def __init__(self, *arguments: Any, example: str | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.example = example

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """Parses arguments, of which unknown ones are an error.

        A subcommand's parser comes here, too, and knows the flags that the user may have meant.
        """
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            suggestion = self._suggestion(unknown[0])
            self.error(suggestion or f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2."""
        message = message.removeprefix("argument ").replace(": it ", " ", 1)
        if self.example and message.startswith(_REQUIRED):
            message = f"{message}, as in {self.example}"
        if not message.endswith("?"):
            message = message.rstrip(".") + "."
        self.exit(2, f"error: {message}\n")

    def _suggestion(self, word: str) -> str | None:
        """A sentence with the flag that an unknown word was probably meant for, or None."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if word.startswith("-"):
            given = word.partition("=")[0]
            near = difflib.get_close_matches(given.replace("_", "-"), flags, 1, cutoff=0.63)
            if not near:
                return None
            return f"there is no {given}: did you mean {near[0]}?"
        meant = "--prompt"
        if "/" in word or "--prompt" not in flags:
            meant = "--model"
        if meant not in flags:
            return None
        shown = shlex.quote(shorten(word, LONGEST_SHOWN, placeholder=" …"))
        return f"{shown} has no flag before it: did you mean {meant} {shown}?"


def _checked(convert: Type, wanted: str) -> Type:
    """A type that converts a value, and otherwise says what is wanted."""

    def checked(raw: Any) -> Any:
        try:
            return convert(raw)
        except (TypeError, ValueError, KeyError, ArgumentTypeError):
            raise ArgumentTypeError(f"it is {raw}: {wanted}") from None

    return checked


def whole_number(low: int, high: float = math.inf, *, or_no_limit: bool = False) -> Type:
    """A type: a whole number of ``low`` to ``high``, or -1 with ``or_no_limit``."""
    wanted = f"give a whole number of {low} or more"
    if math.isfinite(high):
        wanted = f"give {low} to {high}"
    if or_no_limit:
        wanted += ", or -1 for no limit"

    def convert(raw: str | int) -> int:
        # By way of a text neither 2.0 nor True is one.
        value = int(str(raw))
        if or_no_limit and value == -1:
            return value
        if not low <= value <= high:
            raise ValueError
        return value

    return _checked(convert, wanted)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Type:
    """A type: a finite number of ``low`` to ``high``; ``above`` excludes ``low``."""
    is_limited = math.isfinite(high)
    if above and is_limited:
        wanted = f"give a number above {low:g}, at most {high:g}"
    elif above:
        wanted = f"give a number above {low:g}"
    elif is_limited:
        wanted = f"give {low:g} to {high:g}"
    else:
        wanted = f"give a number of {low:g} or more"

    def convert(raw: str | float) -> float:
        value = float(raw)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError
        if above and value == low:
            raise ValueError
        return value

    return _checked(convert, wanted)


def one_of(*choices: Any) -> Type:
    """A type: one of several numbers or words."""
    by_text = {str(choice): choice for choice in choices}
    *others, last = by_text
    wanted = f"choose {last}"
    if others:
        wanted = f"choose {', '.join(others)} or {last}"
    return _checked(lambda raw: by_text[str(raw)], wanted)


_WORDS = dict.fromkeys(("true", "t", "yes", "y", "1"), True)
_WORDS |= dict.fromkeys(("false", "f", "no", "n", "0"), False)
true_or_false = _checked(lambda raw: _WORDS[raw.lower()], "give T or F")


def whole_numbers(low: int) -> Type:
    """A type: whole numbers of ``low`` or more, with commas between."""
    wanted = f"give whole numbers of {low} or more such as 48,96,256"
    convert = whole_number(low)
    return _checked(lambda text: [convert(part) for part in text.split(",")], wanted)


def writable(path: str) -> str:
    """A type: a file that can be written, checked before long work."""
    file = Path(path)
    written = file.parent
    if file.exists():
        written = file
    if file.is_dir() or not os.access(written, os.W_OK):
        raise ArgumentTypeError(f"it is {path}, which cannot be written: choose another place")
    return path


def picture(path: str) -> str:
    """A type: a file that matplotlib can draw into."""
    if not path.lower().endswith(PICTURES):
        raise ArgumentTypeError(f"it is {path}, which must end in {', '.join(PICTURES)}")
    try:
        from_extra("matplotlib", "plot", "it")
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return writable(path)


share = number(0, 1)


json_object = _checked(
    lambda text: msgspec.json.decode(text, type=dict),
    'give a JSON object such as {"enable_thinking": false}',
)


def check(name: str, value: Any, type: Type) -> None:
    """Checks an argument of a Python function; ValueError, naming it, if the type rejects it."""
    try:
        type(value)
    except ArgumentTypeError as error:
        raise ValueError(f"`{name}` {str(error).removeprefix('it ')}.") from None
