"""JSON as the server reads and writes it: finite numbers, whole characters, limited depth."""

import json
import math
from typing import Any

from starlette.responses import Response

MAX_DEPTH = 100  # levels; functions that read or write JSON call themselves for each of them


def loads(text: bytes) -> Any:
    """Reads JSON.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or holds a number that is not finite
            or half of a character, which no tokenizer takes.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, MAX_DEPTH)
    return value


def _check(value: Any, levels: int) -> None:
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError("it is nested too deeply")
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            _check(part, levels - 1)


def dumps(value: Any) -> str:
    """Writes JSON, with null for numbers that are not finite."""
    finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(finite)


def json_response(value: Any, status: int = 200) -> Response:
    """An HTTP response with a JSON body that nobody stores."""
    headers = {"Cache-Control": "no-store"}
    return Response(dumps(value), status, headers, media_type="application/json")
