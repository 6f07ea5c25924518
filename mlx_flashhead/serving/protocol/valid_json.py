"""Strict JSON in both directions, without NaN and Infinity."""

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 100  # levels; readers and writers of JSON call themselves for each


def loads(text: bytes) -> Any:
    """Reads JSON.

    Raises:
        ValueError: If the text is not JSON, is nested too deeply, or holds a number that is not
            finite or half of a character, which no tokenizer takes.
    """
    try:
        decoded = text.decode("utf-8-sig")
        value = json.loads(decoded, parse_constant=_refuse, parse_float=_finite_number)
        _check_depth([value], MAX_DEPTH + 1)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise ValueError("a text in it holds half of a character") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def dumps(value: Any) -> str:
    """Writes JSON, with null for numbers that are not finite."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
        return json.dumps(finite)


def _check_depth(value: dict | list, levels: int) -> None:
    if levels == 0:
        raise RecursionError
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            _check_depth(part, levels - 1)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number
