"""Strict JSON in both directions, without NaN and Infinity."""

import json
import math
from typing import Any, NoReturn


def loads(text: bytes) -> Any:
    """Reads JSON.

    Raises:
        ValueError: If the text is not JSON, or holds a number that is not finite.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dumps(value: Any) -> str:
    """Writes JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(value), allow_nan=False)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
