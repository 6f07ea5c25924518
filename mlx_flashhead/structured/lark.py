"""Lark grammars in llguidance's dialect, as they are put together."""

import json
from collections.abc import Iterable


class LarkRules:
    """Rules and terminals under names of their own. The same body gets the same name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # from a body to its name
        self._bodies: dict[str, str] = {}

    def rule(self, body: str) -> str:
        """The name of a rule with this body."""
        return self._named("r", body)

    def terminal(self, matching: Iterable[str], never: Iterable[str] = ()) -> str:
        """Returns the name of a terminal.

        It is a text that each of ``matching`` matches as a whole, and none of ``never`` does.
        """
        parts = [regex_literal(regex) for regex in matching]
        parts += [f"~{regex_literal(regex)}" for regex in never]
        return self._named("T", " & ".join(parts))

    def text(self, start: str) -> str:
        """The whole grammar, of texts that the expression ``start`` derives."""
        rules = {"start": start, **self._bodies}
        return "".join(f"{name}: {body}\n" for name, body in rules.items() if body)

    def _named(self, prefix: str, body: str) -> str:
        if body not in self._names:
            name = f"{prefix}{len(self._bodies)}"
            self._names[body] = name
            self._bodies[name] = body
        return self._names[body]


def literal(text: str) -> str:
    """A Lark expression of exactly this text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def regex_literal(regex: str) -> str:
    """Returns a regular expression as Lark writes it."""
    return "/" + regex.replace("/", r"\/").replace("\n", r"\n") + "/"


def one_of(expressions: Iterable[str]) -> str:
    """A Lark expression of one of several, of which one may be nothing."""
    distinct = list(dict.fromkeys(expressions))
    written = [expression for expression in distinct if expression.strip()]
    together = written[0] if len(written) == 1 else f"({' | '.join(written)})" if written else ""
    return together if len(written) == len(distinct) or not written else f"({together})?"


def one_of_written(expressions: Iterable[str | None]) -> str | None:
    """A Lark expression of one of those that can be written; None if none can."""
    written = [expression for expression in expressions if expression is not None]
    return one_of(written) if written else None
