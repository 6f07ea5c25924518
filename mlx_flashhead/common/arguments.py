"""Arguments of the commands: types that check a value, and a parser with errors of one sentence."""

import difflib
import json
import math
import os
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

from .command import from_extra

# Takes a value from the command line or from Python, or raises an ArgumentTypeError.
Type = Callable[[Any], Any]
PICTURES = (".png", ".svg", ".pdf", ".jpg")
LONGEST_SHOWN = 60  # characters of a word in an error
_REQUIRED = "the following arguments are required"


class Parser(ArgumentParser):
    """A parser whose error is one sentence, without the usage before it.

    ``example`` is a command line that an error shows where an argument is missing.
    """

    def __init__(self, *arguments: Any, example: str | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.example = example
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """As argparse's, but unknown arguments are an error.

        A subcommand's parser comes here, too, and knows the flags that the user may have meant.
        """
        self._words = list(sys.argv[1:] if args is None else args)
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            suggestion = self._suggestion(unknown[0])
            self.error(suggestion or f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2."""
        message = message.removeprefix("argument ").replace(": it ", " ", 1)
        if message.startswith(_REQUIRED):
            unknown = next((word for word in self._words if self._is_unknown(word)), None)
            suggestion = None if unknown is None else self._suggestion(unknown)
            if suggestion is not None:
                message = suggestion
            elif self.example is not None:
                message = f"{message}, as in {self.example}"
        end = "" if message.endswith("?") else "."
        self.exit(2, f"error: {message.rstrip('.')}{end}\n")

    def _is_unknown(self, word: str) -> bool:
        """Whether a word of the command line is surely no argument.

        It is an unknown flag, or a first word where nothing may stand without a flag.
        """
        if word.startswith("--"):
            flag = word.partition("=")[0]
            return not any(known.startswith(flag) for known in self._option_string_actions)
        return word == self._words[0] and not word.startswith("-") and not self._has_positionals()

    def _has_positionals(self) -> bool:
        return any(not action.option_strings for action in self._actions)

    def _suggestion(self, word: str) -> str | None:
        """A sentence with the flag that an unknown word was probably meant for, or None."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        flags = [flag for flag in known if flag != "--help"]
        if word.startswith("-"):
            flag = word.partition("=")[0]
            meant = _nearest(flag, flags)
            return f"there is no {flag}: did you mean {meant}?" if meant else None
        given = {flag.partition("=")[0] for flag in self._words}
        model_is_missing = "--model" in flags and "--model" not in given
        if "--prompt" in flags and not (model_is_missing and "/" in word):
            meant = "--prompt"
        elif model_is_missing:
            meant = "--model"
        else:
            return None
        shown = shlex.quote(shorten(word, LONGEST_SHOWN, placeholder=" …"))
        return f"{shown} has no flag before it: did you mean {meant} {shown}?"


def _nearest(flag: str, flags: Sequence[str]) -> str | None:
    """The flag that a near miss was meant for, or None.

    It is one that the word begins with, else one of nearly the same letters.
    """
    spelled = flag.lower().replace("_", "-")
    beginnings = [known for known in flags if spelled.startswith(known)]
    if beginnings:
        return max(beginnings, key=len)
    close = difflib.get_close_matches(spelled, flags, n=1, cutoff=0.7)
    return close[0] if close else None


def _checked(convert: Type, wanted: str) -> Type:
    """A type that converts a value, and otherwise says what is wanted."""

    def checked(raw: Any) -> Any:
        try:
            return convert(raw)
        except (TypeError, ValueError, KeyError, ArgumentTypeError):
            raise ArgumentTypeError(f"it is {raw}: {wanted}") from None

    return checked


def whole_number(low: int, high: int | None = None, *, or_no_limit: bool = False) -> Type:
    """A type: a whole number of ``low`` to ``high``, or -1 with ``or_no_limit``."""
    wanted = f"give a whole number of {low} or more" if high is None else f"give {low} to {high}"
    if or_no_limit:
        wanted += ", or -1 for no limit"

    def convert(raw: str | int) -> int:
        value = int(str(raw))  # neither 2.0 nor True
        is_too_large = high is not None and value > high
        is_no_limit = or_no_limit and value == -1
        if (value < low or is_too_large) and not is_no_limit:
            raise ValueError
        return value

    return _checked(convert, wanted)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Type:
    """A type: a finite number of ``low`` to ``high``; ``above`` excludes ``low``."""
    limited = math.isfinite(high)
    if above:
        wanted = f"give a number above {low:g}" + (f", at most {high:g}" if limited else "")
    else:
        wanted = f"give {low:g} to {high:g}" if limited else f"give a number of {low:g} or more"

    def convert(raw: str | float) -> float:
        value = float(raw)
        is_inside = low < value <= high if above else low <= value <= high
        if not is_inside or not math.isfinite(value):
            raise ValueError
        return value

    return _checked(convert, wanted)


def one_of(*choices: Any) -> Type:
    """A type: one of several numbers or words."""
    by_text = {str(choice): choice for choice in choices}
    *others, last = by_text
    listed = f"{', '.join(others)} or {last}" if others else last
    return _checked(lambda raw: by_text[str(raw)], f"choose {listed}")


def true_or_false(raw: str) -> bool:
    """A type: T or F, or another usual word for one of them."""
    word = raw.lower()
    if word in ("true", "t", "yes", "y", "1"):
        return True
    if word in ("false", "f", "no", "n", "0"):
        return False
    raise ArgumentTypeError(f"it is {raw}: give T or F")


def whole_numbers(low: int) -> Type:
    """A type: whole numbers of ``low`` or more, with commas between."""
    wanted = f"give whole numbers of {low} or more such as 48,96,256"
    convert = whole_number(low)
    return _checked(lambda text: [convert(part) for part in text.split(",")], wanted)


def writable(path: str) -> str:
    """A type: a file that can be written, checked before long work."""
    file = Path(path)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
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


def _object_of(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


json_object = _checked(_object_of, 'give a JSON object such as {"enable_thinking": false}')


def check(name: str, value: Any, type: Type) -> None:
    """Checks an argument of a Python function; ValueError, naming it, if the type rejects it."""
    try:
        type(value)
    except ArgumentTypeError as error:
        raise ValueError(f"`{name}` {str(error).removeprefix('it ')}.") from None
