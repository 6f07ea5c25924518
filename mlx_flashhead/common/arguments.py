"""Arguments of the commands: types that check a value, and a parser with errors of one sentence."""

import json
import math
import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .command import from_extra

# Takes a value from the command line or from Python, or raises an ArgumentTypeError.
Type = Callable[[Any], Any]
PICTURES = (".png", ".svg", ".pdf", ".jpg")


class Parser(ArgumentParser):
    """A parser whose error is one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit code 2."""
        message = message.removeprefix("argument ").replace(": it ", " ", 1)
        self.exit(2, f"error: {message.rstrip('.')}.\n")


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
    wanted += ", or -1 for no limit" if or_no_limit else ""

    def convert(raw: str | int) -> int:
        value = int(str(raw))  # neither 2.0 nor True
        if not (low <= value <= (value if high is None else high) or (or_no_limit and value == -1)):
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
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            raise ValueError
        return value

    return _checked(convert, wanted)


def one_of(*choices: Any) -> Type:
    """A type: one of several numbers or words."""
    by_text = {str(choice): choice for choice in choices}
    *others, last = by_text
    listed = f"{', '.join(others)} or {last}" if others else last
    return _checked(lambda raw: by_text[str(raw)], f"choose {listed}")


def whole_numbers(low: int) -> Type:
    """A type: whole numbers of ``low`` or more, with commas between."""
    wanted = f"give whole numbers of {low} or more such as 48,96,256"
    return _checked(lambda text: [*map(whole_number(low), text.split(","))], wanted)


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
        from_extra("matplotlib", "report", "it")
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return writable(path)


share = number(0, 1)
# a TypeError if the text is no object
json_object = _checked(
    lambda text: {**json.loads(text)}, 'give a JSON object such as {"enable_thinking": false}'
)


def check(name: str, value: Any, type: Type) -> None:
    """Checks an argument of a Python function; ValueError, naming it, if the type rejects it."""
    try:
        type(value)
    except ArgumentTypeError as error:
        raise ValueError(f"`{name}` {str(error).removeprefix('it ')}.") from None
