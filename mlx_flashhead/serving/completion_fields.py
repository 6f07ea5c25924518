"""The fields of chats and of texts: each has OpenAI's meaning, or changes nothing, or is an error.

A field's type, its limits and its default stand where it is declared.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from .api_errors import field_error
from .fields import (
    Count,
    Limit,
    Share,
    StopText,
    StopTexts,
    Temperature,
    read_struct,
    shown,
    without_nulls,
)

# Texts of a request: n times the number of its prompts.
MAX_CHOICES = 16
MAX_LOGPROBS = 20

Penalty = Annotated[float, Meta(ge=-1e30, le=1e30)]


class _StreamUsage(Struct):
    """Of a request with ``stream``."""

    include_usage: bool = False


class _TextPart(Struct, tag="text", tag_field="type"):
    text: str


class _Function(Struct):
    name: str


class _Call(Struct):
    function: _Function


class Message(Struct):
    """What is checked of a message. Templates get the rest as it is."""

    role: str
    content: Annotated[
        str | Annotated[list[_TextPart], Meta(max_length=1024)] | None,
        Meta(description='a text, or a list of at most 1,024 {"type": "text", "text": "…"}'),
    ] = None
    tool_calls: Annotated[
        Annotated[list[_Call], Meta(max_length=128)] | None,
        Meta(description="a list of calls, at most 128, each with a function that has a name"),
    ] = None
    images: Annotated[
        Annotated[list[Any], Meta(max_length=0)] | None,
        Meta(description="left out, since no images are read here"),
    ] = None


SCHEMA_WORDS = 'an object with a "name" and a "schema"'


class Schema(Struct, forbid_unknown_fields=True):
    """A schema with its name. It is obeyed, whether it is ``strict`` or not."""

    name: Annotated[str, Meta(min_length=1)]
    schema: Any = msgspec.field(default_factory=lambda: {"type": "object"})
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """The form of an answer, described in the field that has the name of its type."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: Annotated[Schema | None, Meta(description=SCHEMA_WORDS)] = None
    regex: str | None = None
    grammar: str | None = None


class Fields(Struct, kw_only=True):
    """The fields of chats and of texts. None stands for the server's default.

    Attributes:
        n: The number of answers to each prompt.
        top_k: The number of likeliest tokens that may be drawn; 0 stands for all.

    The others have OpenAI's or mlx-lm's meaning.
    """

    model: Any = None
    stream: bool = False
    stream_options: Annotated[
        _StreamUsage | None, Meta(description='an object such as {"include_usage": true}')
    ] = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    stop: Annotated[
        StopText | StopTexts,
        Meta(description="a text or a list of at most 16 texts, each of 1 to 1,000 characters"),
    ] = []
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Count | None = None
    min_p: Share | None = None
    xtc_probability: Share = 0.0
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    repetition_penalty: Annotated[float, Meta(ge=0, le=1e30)] = 0.0
    repetition_context_size: Count = 20
    presence_penalty: Penalty = 0.0
    presence_context_size: Count = 20
    frequency_penalty: Penalty = 0.0
    frequency_context_size: Count = 20
    logit_bias: Annotated[
        dict[str, float], Meta(description="an object, to give each token id a number")
    ] = {}
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    response_format: Annotated[
        ResponseFormat | None,
        Meta(description="an object with a type: text, json_object, json_schema, regex, grammar"),
    ] = None
    regex: str | None = None
    grammar: str | None = None
    n_probes: int | None = None
    dense: bool | None = None
    num_draft_tokens: Annotated[int, Meta(ge=1, le=64)] | None = None


class ChatFields(Fields, kw_only=True):
    """The fields of a chat."""

    messages: Annotated[
        list[Message],
        Meta(
            min_length=1,
            max_length=4096,
            description='a list of 1 to 4,096 objects such as {"role": "user", "content": "…"}',
        ),
    ]
    tools: Annotated[list[Any], Meta(max_length=512, description="a list of at most 512")] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    verbosity: str | None = None
    enable_thinking: bool | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class TextFields(Fields, kw_only=True):
    """The fields of texts to continue."""

    prompt: Any = None
    suffix: str = ""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


# Fields of other servers and of the other endpoint, with the values that would change nothing.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "functions": (),
    "function_call": (),
    "audio": (),
    "images": ([],),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "format": ("",),
    "options": ({},),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "repeat_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "prompt_logprobs": (0, False),
    "adapters": (),
    "role_mapping": (),
    "modalities": (["text"],),
    "prompt": (),
    "suffix": ("",),
    "messages": (),
    "tools": ([],),
    "top_logprobs": (0,),
}
# What -1 stands for: no limit of an answer's own, and all tokens.
_MINUS_ONE = {"max_tokens": None, "max_completion_tokens": None, "top_k": 0}


def read_fields(body: Mapping[str, Any], struct: type[Fields]) -> tuple[Any, list[str]]:
    """Reads the fields of a request.

    Args:
        body: Names and values as the client sent them. ``null`` counts as absent.
        struct: The fields that have an effect.

    Returns:
        The fields, and the names of those without effect.

    Raises:
        ApiError: If a field has a wrong value, or would have an effect elsewhere.
    """
    values = dict(body)
    for name, unlimited in _MINUS_ONE.items():
        if values.get(name) == -1:
            values[name] = unlimited
    values = without_nulls(values)
    ignored = []
    for name, value in values.items():
        if name in struct.__struct_fields__:
            continue
        if name in _ELSEWHERE:
            _check_neutral(name, value)
        else:
            ignored.append(name)
    return read_struct(values, struct), ignored


def _check_neutral(name: str, value: Any) -> None:
    """Raises an ApiError if a field would change the answer of another server."""
    neutral = _ELSEWHERE[name]
    if not neutral:
        raise field_error(name, "cannot be followed here: leave it out.")
    if not any(value == known and type(value) is type(known) for known in neutral):
        allowed = " or ".join(json.dumps(known) for known in neutral)
        raise field_error(name, f"is {shown(value)}: here it can be {allowed}, or left out.")
