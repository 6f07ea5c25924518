"""The JSON that the server writes: always valid, with errors in the form of OpenAI's API.

mlx-lm's server finds :data:`STRICT_JSON` under the name of the module ``json``.
"""

import json
import math
from types import SimpleNamespace
from typing import Any

# What OpenAI's API gives a token that is too unlikely to have a logprob.
VERY_UNLIKELY = -9999.0


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps`` without NaN and Infinity, which are not JSON.

    The logprob of a token that is ruled out is -inf: it becomes :data:`VERY_UNLIKELY`. Whatever
    else is infinite, or not a number, becomes null.
    """
    if isinstance(value, dict) and isinstance(value.get("error"), str):
        value = {"error": problem(value["error"])}
    return json.dumps(_finite(value), allow_nan=False, **options)


def problem(message: str) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        unlikely = value.get("logprob") == -math.inf
        finite = {key: _finite(part) for key, part in value.items()}
        return finite | {"logprob": VERY_UNLIKELY} if unlikely else finite
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


STRICT_JSON = SimpleNamespace(dumps=dumps, loads=json.loads, JSONDecodeError=json.JSONDecodeError)
