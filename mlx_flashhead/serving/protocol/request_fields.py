"""The fields of a request's body. Each is checked when it is taken."""

import math
from typing import Any

from .errors import Problem, wrong

_KINDS = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
MAX_NUMBER = 1e30


class Fields:
    """A body whose fields are taken one by one. Fields that are left at the end are unknown.

    A field that is null counts as missing. Each method raises a :class:`Problem` of one sentence
    that names the field.
    """

    def __init__(self, body: dict[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: type | None = None, default: Any = None) -> Any:
        """The field's value, of the type ``kind`` unless that is None."""
        value = self._left.pop(name, default)
        if kind is not None and value is not default and not isinstance(value, kind):
            raise wrong(name, f"must be {_KINDS[kind]}.")
        return value

    def whole(self, name: str, default: Any, low: int = 0, high: int = 2**31 - 1) -> Any:
        """A whole number within limits, or the default."""
        if (value := self.take(name)) is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, f"is {_short(value)}: it must be a whole number, {low} to {high}.")
        return value

    def number(
        self, name: str, default: float, low: float = -MAX_NUMBER, high: float = math.inf
    ) -> float:
        """A number within limits, or the default."""
        if (value := self.take(name)) is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, "must be a number.")
        if not (low <= value <= high and abs(value) < MAX_NUMBER):
            limits = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise wrong(name, f"is {_short(value)}: it must be {limits}.")
        return float(value)

    def only(self, name: str, *values: Any, why: str) -> None:
        """Takes a field that may only have one of ``values``, and says ``why``."""
        value = self.take(name)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise Problem(f"{name}: {why}", name)

    def end(self) -> None:
        """Checks that all fields were taken, so that none is ignored."""
        for name in self._left:
            raise Problem(f"{_short(name)} is not a field of this server.", name[:80])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
