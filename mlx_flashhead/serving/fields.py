"""Fields of a request as msgspec declares them: read, or refused by a sentence that names one."""

import json
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from .api_errors import ApiError

MAX_NAME = 40  # characters of a name or a value in a sentence
MAX_INT = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
Limit = Annotated[int, Meta(ge=1, le=MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]  # as OpenAI's
StopText = Annotated[
    str, Meta(min_length=1, max_length=1000, description="a text of 1 to 1,000 characters")
]
StopTexts = Annotated[
    list[StopText],
    Meta(max_length=16, description="a list of at most 16 texts, each of 1 to 1,000 characters"),
]

Fields = TypeVar("Fields", bound=Struct)

_WORDS = {
    bool: "true or false",
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
# Types of a message's parts that models with eyes or ears take, in three APIs' words.
_NO_TEXTS = (
    *("image", "image_url", "input_image", "audio", "audio_url", "input_audio"),
    *("video", "video_url", "document", "file", "input_file"),
)
_AT = " - at `$"


def read_struct(values: Mapping[str, Any], kind: type[Fields]) -> Fields:
    """Reads fields as a struct declares them.

    Args:
        values: Names and values.
        kind: The struct. A union within it is told apart by a field ``type``.

    Raises:
        ApiError: If a value is wrong. It says where it is, what it is, and what it must be.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), values, kind) from None


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that are there: ``null`` counts as absent."""
    return {name: value for name, value in body.items() if value is not None}


def _refusal(problem: str, values: Mapping[str, Any], kind: type[Struct]) -> ApiError:
    """The error of a wrong value.

    Args:
        problem: In msgspec's words. It may quote the client before the path of the value, which is
            such as ``$.messages[0].content[1]``.
        values: The fields.
        kind: What they should be.
    """
    said, at, path = problem.rpartition(_AT)
    if not at:
        said = problem
        path = ""
    if unknown := re.match(r"Object contains unknown field `(.*)`", said, re.DOTALL):
        name = unknown[1]
        return ApiError(f"{name:.{MAX_NAME}} is not a field of this server.", name[:80])
    keys = re.findall(r"\w+|\[\d+\]", path)
    keys += re.findall(r"^Object missing required field `(.*)`$", said)
    value: Any = values
    hint: Any = kind
    where = ""
    told = ("", "", "")
    for key in keys:
        hint = _hint_of(hint, value, key)
        value = _value_of(value, key)
        if key == "type" and value in _NO_TEXTS:
            return ApiError(
                f"{where} is {shown(value)}: this model takes text only.", _param(where)
            )
        where += key if key.startswith("[") or not where else f".{key}"
        if words := _words(hint):
            told = (where, shown(value), words)
    place, found, wanted = told
    return ApiError(f"{place} is {found}: it must be {wanted}.", _param(where))


def _param(where: str) -> str:
    """The field that an error names, of a place such as ``messages[0].content[1].text``."""
    param = re.match(r"(messages|input)\[\d+\](\.\w+)?|\w*", where)
    assert param is not None  # since it may be empty
    return param[0]


def _hint_of(hint: Any, value: Any, key: str) -> Any:
    """The type of what a value of a type has under a key; None if it has nothing there."""
    structs = [kind for kind in _alternatives(hint) if _is_struct(kind)]
    if key == "type" and any(kind.__struct_config__.tag for kind in structs):
        return Literal[tuple(kind.__struct_config__.tag for kind in structs)]
    for alternative in _alternatives(hint):
        if key.startswith("["):
            if get_origin(alternative) is list:
                return get_args(alternative)[0]
        elif _is_struct(alternative):
            tag = alternative.__struct_config__.tag
            if tag is None or tag == value.get("type"):
                return get_type_hints(alternative, include_extras=True).get(key)
    return None


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Struct)


def _value_of(value: Any, key: str) -> Any:
    """What JSON has under a key, if it has one."""
    if key.startswith("["):
        return value[int(key[1:-1])]
    return value.get(key) if isinstance(value, dict) else None


def _alternatives(hint: Any) -> list[Any]:
    """The types of which a value has one."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _alternatives(get_args(hint)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    return [hint]


def _words(hint: Any) -> str:
    """What values of a type are; nothing for a type that its field describes."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _words(get_args(hint)[0])
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in get_args(hint))
    if origin is not Annotated:
        return _WORDS.get(origin or hint, "")
    kind, limits = get_args(hint)
    if limits.description is not None:
        return limits.description
    if limits.ge is None:
        return _words(kind)
    return f"{_words(kind)}, {limits.ge} to {limits.le}"


def shown(value: Any) -> str:
    """A value as it fits into a sentence."""
    if value is None:
        return "missing"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"
