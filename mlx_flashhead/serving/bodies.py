"""Bodies: JSON of requests, counted before any of it is made, and JSON of responses.

A body of 4 MiB can hold a million lists. Python takes seconds and hundreds of megabytes for them,
and lets no other thread run while it reads JSON.
"""

import json
import re
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response

from .api_errors import ApiError

# Each address has one body of more bytes at a time in memory.
LARGE_BODY = 64 << 10
# Values are token ids, for example.
MAX_VALUES = 300_000
# Objects, lists and members of objects take more memory and time than other values.
MAX_OBJECTS = 50_000
# What reads or writes JSON calls itself for each level.
MAX_DEPTH = 100
# Escapes in JSON: of a whole character, else of the half of one.
_ESCAPES = re.compile(
    rb"(\\ud[89ab]..\\ud[c-f]..|\\ud[0-7]|\\u[^d]|\\[^u])|\\ud[0-9a-f]{3}",
    re.IGNORECASE | re.DOTALL,
)


def fields_of(body: bytes) -> dict[str, Any]:
    """Returns the fields of a request, as many as it may have.

    Raises:
        ApiError: If the body is no JSON object, or too much; the error says of what.
    """
    check_size(body)
    try:
        fields = read_json(body)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError("The body must be a JSON object.")
    return fields


def check_size(text: bytes) -> None:
    """Checks that JSON has no more values than it may.

    If the text is no JSON, any number may be counted.

    Raises:
        ApiError: If there are more.
    """
    letters = _outside_strings(text)
    n_of = {letter: int(np.count_nonzero(letters == ord(letter))) for letter in ",:[{"}
    n_values = n_of[","] + n_of["["] + n_of["{"]
    n_objects = n_of[":"] + n_of["["] + n_of["{"]
    for number, limit, what in (
        (n_objects, MAX_OBJECTS, "lists, objects and members of objects"),
        (n_values, MAX_VALUES, "values"),
    ):
        if number > limit:
            raise ApiError(
                f"The body has {number:,} {what}, and at most {limit:,} are read: send less."
            )


def read_json(text: bytes) -> Any:
    """Reads JSON of finite numbers.

    Half of a character becomes U+FFFD, as where browsers send a text. Editors that cut a text by
    UTF-16's units leave one.

    Raises:
        ValueError: If it is not JSON, or is nested too deeply.
    """
    letters = _outside_strings(text)
    opened = (letters == ord("[")) | (letters == ord("{"))
    closed = (letters == ord("]")) | (letters == ord("}"))
    levels = np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int32)
    if levels.max(initial=0) > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    # A file in UTF-8 may begin with this mark.
    text = text.removeprefix(b"\xef\xbb\xbf")
    try:
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(text)
        return msgspec.json.decode(_ESCAPES.sub(lambda escape: escape[1] or rb"\ufffd", text))
    except msgspec.DecodeError as error:
        raise ValueError(str(error).removeprefix("JSON is malformed: ")) from None


def _outside_strings(text: bytes) -> np.ndarray:
    """The bytes of JSON that are in no string, (n,) uint8.

    NumPy finds them, and other threads run meanwhile, as they cannot while Python reads JSON.
    """
    without_escapes = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    letters = np.frombuffer(without_escapes, dtype=np.uint8)
    in_string = np.logical_xor.accumulate(letters == ord('"'))
    return letters[~in_string]


def write_json(value: Any) -> str:
    """Writes JSON, with null for numbers that are not finite."""
    finite = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    return json.dumps(finite)


def json_response(value: Any, status: int = 200) -> Response:
    """An HTTP response with a JSON body that nobody stores."""
    headers = {"Cache-Control": "no-store"}
    return Response(write_json(value), status, headers, media_type="application/json")
