"""JSON as the server reads and writes it: finite numbers, whole characters, limited depth."""

import json
import math
from typing import Any

import numpy as np
from starlette.responses import Response

MAX_DEPTH = 100  # levels; what reads or writes JSON calls itself for each of them


def loads(text: bytes) -> Any:
    """Reads JSON.

    Half of a character, which no tokenizer takes, becomes U+FFFD, as where browsers send a text.
    Editors that cut a text by UTF-16's units leave one.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or holds a number that is not finite.
    """
    letters = outside_strings(text)
    opened = (letters == ord("[")) | (letters == ord("{"))
    closed = (letters == ord("]")) | (letters == ord("}"))
    levels = np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int32)
    if levels.max(initial=0) > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    value = json.loads(
        text.decode("utf-8-sig"), parse_float=_finite_number, parse_constant=_finite_number
    )
    if b"\\u" in text:  # which alone can spell half of a character
        written = json.dumps(value, ensure_ascii=False)
        whole = written.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value if whole == written else json.loads(whole)
    return value


def outside_strings(text: bytes) -> np.ndarray:
    """The bytes of JSON that are in no string, (n,) uint8.

    NumPy finds them, and other threads run meanwhile, as they cannot while Python reads JSON.
    """
    without_escapes = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    letters = np.frombuffer(without_escapes, dtype=np.uint8)
    in_string = np.logical_xor.accumulate(letters == ord('"'))
    return letters[~in_string]


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


def dumps(value: Any) -> str:
    """Writes JSON, with null for numbers that are not finite."""
    finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(finite)


def json_response(value: Any, status: int = 200) -> Response:
    """An HTTP response with a JSON body that nobody stores."""
    headers = {"Cache-Control": "no-store"}
    return Response(dumps(value), status, headers, media_type="application/json")
