"""Fields of a request as msgspec declares them: read, or refused by a sentence that names one."""

import json
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from .api_errors import ApiError

# A name or a value in a sentence has so many characters at most.
MAX_NAME = 40
MAX_INT = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
Limit = Annotated[int, Meta(ge=1, le=MAX_INT)]
Share = Annotated[float, Meta(ge=0, le=1)]
# OpenAI's limits.
Temperature = Annotated[float, Meta(ge=0, le=2)]
StopText = Annotated[
    str, Meta(min_length=1, max_length=1000, description="a text of 1 to 1,000 characters")
]
StopTexts = Annotated[
    list[StopText],
    Meta(max_length=16, description="a list of at most 16 texts, each of 1 to 1,000 characters"),
]

AnyStruct = TypeVar("AnyStruct", bound=Struct)

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


def read_struct(values: Mapping[str, Any], struct: type[AnyStruct]) -> AnyStruct:
    """Reads fields as a struct declares them.

    Args:
        values: Names and values.
        struct: The struct. A field ``type`` says which one of a union within it a value is.

    Raises:
        ApiError: If a value is wrong. It says where it is, what it is, and what it must be.
    """
    try:
        return msgspec.convert(values, struct)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), values, struct) from None


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that are there: ``null`` counts as absent."""
    return {name: value for name, value in body.items() if value is not None}


def _refusal(problem: str, values: Mapping[str, Any], struct: type[Struct]) -> ApiError:
    """The error of a wrong value.

    Args:
        problem: In msgspec's words. It may quote the client before the path of the value, which is
            such as ``$.messages[0].content[1]``.
        values: The fields.
        struct: What they should be.
    """
    said, at, json_path = problem.rpartition(_AT)
    if not at:
        said = problem
        json_path = ""
    unknown = re.match(r"Object contains unknown field `(.*)`", said, re.DOTALL)
    if unknown is not None:
        name = unknown[1]
        return ApiError(f"{name:.{MAX_NAME}} is not a field of this server.", name[:80])
    keys = re.findall(r"\w+|\[\d+\]", json_path)
    keys += re.findall(r"^Object missing required field `(.*)`$", said)
    value: Any = values
    hint: Any = struct
    path = ""
    sentence = ""
    for key in keys:
        hint = _hint_of(hint, value, key)
        value = _value_of(value, key)
        if key == "type" and value in _NO_TEXTS:
            sentence = f"{path} is {shown(value)}: this model takes text only."
            break
        path = _path_of(path, key)
        wanted = _words(hint)
        if wanted:
            sentence = f"{path} is {shown(value)}: it must be {wanted}."
    return ApiError(sentence, _param(path))


def _path_of(parent: str, key: str) -> str:
    """The path of what a value has under a key, such as ``messages[0].content[1].text``."""
    if not parent or key.startswith("["):
        return parent + key
    return f"{parent}.{key}"


def _param(path: str) -> str:
    """The field that an error names, of a path such as ``messages[0].content[1].text``."""
    param = re.match(r"(messages|input)\[\d+\](\.\w+)?|\w*", path)
    # The expression matches an empty text, too.
    assert param is not None
    return param[0]


def _hint_of(hint: Any, value: Any, key: str) -> Any:
    """The type of what a value of a type has under a key; None if it has nothing there."""
    structs = [struct for struct in _alternatives(hint) if _is_struct(struct)]
    tags = [struct.__struct_config__.tag for struct in structs]
    if key == "type" and any(tags):
        return Literal[tuple(tags)]
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
    if isinstance(value, dict):
        return value.get(key)
    return None


def _alternatives(hint: Any) -> list[Any]:
    """The types of which a value has one."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _alternatives(get_args(hint)[0])
    if origin in (Union, UnionType):
        alternatives = []
        for member in get_args(hint):
            alternatives += _alternatives(member)
        return alternatives
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
    value_type, limits = get_args(hint)
    if limits.description is not None:
        return limits.description
    if limits.ge is None:
        return _words(value_type)
    return f"{_words(value_type)}, {limits.ge} to {limits.le}"


def shown(value: Any) -> str:
    """A value as it fits into a sentence."""
    if value is None:
        return "missing"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_NAME:
        return f"{text[:MAX_NAME]}…"
    return text
