"""Errors of all commands: one sentence and exit code 2 for a mistake that a user can correct."""

import errno
import functools
import importlib
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .interrupts import INTERRUPTED, end_at_signals

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_REMEDIES = dict.fromkeys(_FULL, "free some space or choose another place")
_REMEDIES |= dict.fromkeys(_FORBIDDEN, "choose another place, or get the permission")
_PARAMETER = re.compile(r"`([a-z]+(?:_[a-z]+)*)(=True|=False)?`")
# An answer must not move the cursor, change colours or ring the bell, here or behind a pipe.
UNPRINTABLE = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a command's ``main``: mistakes end with a sentence on stderr, never a traceback."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        end_at_signals()
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            sys.exit(141)
        except (ValueError, OSError) as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            sys.exit(2)

    return run


def sentence(error: BaseException) -> str:
    """The error's message for a user of a command, on one line, with flags for parameters."""
    if isinstance(error, OSError) and error.strerror:
        remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk")
        message = f"{error.strerror}: {remedy}."
        if error.filename:
            message = f"{error.filename}: {message}"
        return printable(message)
    message = str(error).strip().split("\n")[0] or type(error).__name__
    return printable(with_flags(message))


def with_flags(text: str) -> str:
    """A text that names parameters of Python, such as `build=False`, with a command's flags."""

    def flag(parameter: re.Match[str]) -> str:
        name = parameter[1].removesuffix("_group").replace("_", "-")
        if parameter[2] == "=False":
            return f"--no-{name}"
        return f"--{name}"

    return _PARAMETER.sub(flag, text)


def printable(text: str) -> str:
    """The text without what could control a terminal."""
    return text.translate(UNPRINTABLE)


def from_extra(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module of an extra; ValueError, for ``what`` needs it, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = f"{what} needs {error.name}, which is not installed"
        raise ValueError(f"{missing}: pip install 'mlx_flashhead[{extra}]'.") from error
