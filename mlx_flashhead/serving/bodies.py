"""What a request's body may hold: counted before any of it is made or looked at.

A body of 4 MiB can hold a million lists. Python takes seconds and hundreds of megabytes for them,
and lets no other thread run while it reads JSON.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .api_errors import ApiError
from .strict_json import loads, outside_strings

LARGE_BODY = 64 << 10  # bytes: of larger ones, each address has one at a time in memory
MAX_VALUES = 300_000  # such as token ids
MAX_OBJECTS = 50_000  # objects, lists, and members of objects, which take more memory and time
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of a message's content
MAX_CALLS = 128  # of a message
MAX_TOOLS = 512
MAX_PROMPTS = 1024

_GRAMMAR_FIELDS = ("response_format", "regex", "grammar", "tools")


def fields_of(body: bytes) -> dict[str, Any]:
    """Returns the fields of a request, as many as it may have.

    Raises:
        ApiError: If the body is no JSON object, or too much; the error says of what.
    """
    check_size(body)
    try:
        fields = loads(body)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError("The body must be a JSON object.")
    check_lengths(fields)
    return fields


def has_grammar(fields: Mapping[str, Any]) -> bool:
    """Whether a request asks for a form of its answer, whose grammar takes long to compile."""
    return any(fields.get(name) is not None for name in _GRAMMAR_FIELDS)


def check_size(text: bytes) -> None:
    """Checks that JSON has no more values than it may.

    If the text is no JSON, any number may be counted.

    Raises:
        ApiError: If there are more.
    """
    letters = outside_strings(text)
    n_of = {letter: int(np.count_nonzero(letters == ord(letter))) for letter in ",:[{"}
    n_values = n_of[","] + n_of["["] + n_of["{"]
    n_objects = n_of[":"] + n_of["["] + n_of["{"]
    for number, limit, what in (
        (n_objects, MAX_OBJECTS, "lists, objects and members of objects"),
        (n_values, MAX_VALUES, "values"),
    ):
        if number > limit:
            most = f"at most {limit:,} are read: send less"
            raise ApiError(f"The body has {number:,} {what}, and {most}.")


def check_lengths(fields: Mapping[str, Any]) -> None:
    """Checks that no list is longer than it may be, before anything looks at its elements.

    Raises:
        ApiError: If one is longer.
    """
    _check_length(fields.get("messages"), MAX_MESSAGES, "messages", "messages")
    _check_length(fields.get("tools"), MAX_TOOLS, "tools", "tools")
    prompts = fields.get("prompt")
    if isinstance(prompts, list) and prompts and type(prompts[0]) is not int:
        _check_length(prompts, MAX_PROMPTS, "prompt", "texts")
    arguments: list[str] = []  # of all calls
    messages = fields.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        if not isinstance(message, dict):
            continue
        where = f"messages[{i}]"
        _check_length(message.get("content"), MAX_PARTS, f"{where}.content", "parts")
        calls = message.get("tool_calls")
        _check_length(calls, MAX_CALLS, f"{where}.tool_calls", "calls")
        arguments += _arguments_of(calls)
    check_size(",".join(arguments).encode(errors="replace"))  # JSON within JSON


def _check_length(value: Any, limit: int, field: str, elements: str) -> None:
    if isinstance(value, list) and len(value) > limit:
        most = f"at most {limit:,} are read: send fewer"
        raise ApiError(f"{field} has {len(value):,} {elements}, and {most}.", field)


def _arguments_of(calls: Any) -> list[str]:
    """The arguments of calls that are texts, as far as the calls are sound."""
    found = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(arguments, str):
            found.append(arguments)
    return found
