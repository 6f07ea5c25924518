"""Errors in OpenAI's one form, and strict JSON in both directions, without NaN and Infinity."""

import json
import math
from http import HTTPStatus
from typing import Any, NoReturn

MAX_DEPTH = 100  # levels; readers and writers of JSON call themselves for each


class ApiError(ValueError):
    """A rejected request: a sentence, the wrong field if there is one, and a word for programs."""

    def __init__(
        self, message: str, field: str | None = None, *, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.field, self.status, self.code = field, HTTPStatus(status), code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.code}
        return {"error": error}


def wrong(field: str, why: str) -> ApiError:
    """The error of a wrong field: a sentence that begins with the field's name."""
    return ApiError(f"{field} {why}", field)


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
