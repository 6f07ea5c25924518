"""One line after the traceback of a program that ends by an error, for those who run it."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

_explained: list[tuple[BaseException, str]] = []


def explain(error: BaseException, text: str) -> None:
    """Prints a text after the traceback if this program ends by an error.

    Args:
        error: The error, or the cause of the one that ends the program.
        text: The explanation.
    """
    if not _explained:
        sys.excepthook = partial(_print_after, sys.excepthook)
        threading.excepthook = partial(_print_after_thread, threading.excepthook)
    _explained.append((error, text))


def _print_after(
    original: Callable[..., Any], kind: Any, error: BaseException | None, traceback: Any
) -> None:
    original(kind, error, traceback)
    _print_text(error)


def _print_after_thread(original: Callable[..., Any], arguments: Any) -> None:
    original(arguments)
    _print_text(arguments.exc_value)


def _print_text(error: BaseException | None) -> None:
    causes = list(_causes(error))
    for known, text in _explained:
        if any(known is cause for cause in causes):
            print(text, file=sys.stderr)
            return


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those on the way to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
