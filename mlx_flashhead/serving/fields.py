"""The fields of a request: which there are, what each may hold, and which have no effect here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .api_errors import ApiError, field_error

MAX_CHOICES = 16  # texts of a request: n times the number of its prompts
MAX_LOGPROBS = 20
PENALTIES = ("repetition", "presence", "frequency")
# Variables of chat templates that are also fields of OpenAI's API.
TEMPLATE_FIELDS = ("reasoning_effort", "verbosity")

_TYPE_NAMES = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
_MAX_INT = 2**31 - 1
_MAX_NAME = 40  # characters of a name or a value in a sentence


class Rule(Protocol):
    """What a field may hold."""

    def read(self, name: str, value: Any) -> Any:
        """Returns the value of a field. None stands for an absent field.

        Raises:
            ApiError: If the value is not allowed; it names the field.
        """


@dataclass(frozen=True)
class Of:
    """Values of a type; any with `object`."""

    kind: type

    def read(self, name: str, value: Any) -> Any:
        """Returns the value if it is of the type.

        Raises:
            ApiError: If it is not; it names the field.
        """
        if not isinstance(value, self.kind):
            raise field_error(name, f"must be {_TYPE_NAMES[self.kind]}.")
        return value


@dataclass(frozen=True)
class Number:
    """Numbers of a type within limits. ``instead`` replaces some values, such as -1."""

    kind: type
    low: float
    high: float
    instead: Mapping[int, int | None] | None = None

    def read(self, name: str, value: Any) -> Any:
        """Returns the number if it is within the limits, or what stands instead of it.

        Raises:
            ApiError: If it is not; it names the field.
        """
        is_number = type(value) in (int, self.kind)
        if is_number and self.instead is not None and value in self.instead:
            return self.instead[value]
        if not is_number or not self.low <= value <= self.high:
            wanted = "a whole number" if self.kind is int else "a number"
            limits = f"it must be {wanted}, {self.low} to {self.high}"
            raise field_error(name, f"is {shortened(value)}: {limits}.")
        return self.kind(value)


@dataclass(frozen=True)
class OneOf:
    """Certain values alone."""

    values: tuple[Any, ...] = ()

    def read(self, name: str, value: Any) -> Any:
        """Returns the value if it is one of those allowed.

        Raises:
            ApiError: If it is not; it names the field.
        """
        if not self.values:
            raise field_error(name, "cannot be followed here: leave it out.")
        if not any(value == known and type(value) is type(known) for known in self.values):
            allowed = " or ".join(json.dumps(known) for known in self.values)
            remedy = f"here it can be {allowed}, or left out"
            raise field_error(name, f"is {shortened(value)}: {remedy}.")
        return value


_COUNT = Number(int, 0, _MAX_INT)
_SHARE = Number(float, 0, 1)
_MAX_TOKENS = Number(int, 1, _MAX_INT, instead={-1: None})  # -1: no limit of its own
_PENALTY = Number(float, -1e30, 1e30)
_NEVER = OneOf()

# Fields of other servers that would change an answer, with the values that would not.
_UNSUPPORTED: dict[str, Rule] = {
    "best_of": OneOf((1,)),
    "echo": OneOf((False,)),
    "functions": _NEVER,
    "function_call": _NEVER,
    "audio": _NEVER,
    "web_search_options": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "guided_choice": _NEVER,
    "guided_grammar": _NEVER,
    "structured_outputs": _NEVER,
    "format": OneOf(("",)),
    "options": OneOf(({},)),
    "min_tokens": OneOf((0,)),
    "ignore_eos": OneOf((False,)),
    "stop_token_ids": OneOf(([],)),
    "bad_words": OneOf(([],)),
    "use_beam_search": OneOf((False,)),
    "length_penalty": OneOf((1, 1.0)),
    "repeat_penalty": OneOf((1, 1.0)),
    "typical_p": OneOf((1, 1.0)),
    "tfs_z": OneOf((1, 1.0)),
    "mirostat": OneOf((0,)),
    "prompt_logprobs": OneOf((0, False)),
    "adapters": _NEVER,
    "role_mapping": _NEVER,
}
_FIELDS: dict[str, Rule] = {
    "model": Of(object),
    "stream": Of(bool),
    "stream_options": Of(dict),
    "n": Number(int, 1, MAX_CHOICES),
    "max_tokens": _MAX_TOKENS,
    "max_completion_tokens": _MAX_TOKENS,
    "stop": Of(object),
    "temperature": Number(float, 0, 2),  # as OpenAI's
    "top_p": _SHARE,
    "top_k": Number(int, 0, _MAX_INT, instead={-1: 0}),  # 0: all tokens
    "min_p": _SHARE,
    "xtc_probability": _SHARE,
    "xtc_threshold": Number(float, 0, 0.5),
    "repetition_penalty": Number(float, 0, 1e30),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    **{f"{kind}_context_size": _COUNT for kind in PENALTIES},
    "logit_bias": Of(dict),
    "seed": Number(int, -(2**63), 2**64 - 1),
    "response_format": Of(object),
    "regex": Of(object),
    "grammar": Of(object),
    "dense": Of(bool),
    "num_draft_tokens": Number(int, 1, 64),
}
CHAT_FIELDS: Mapping[str, Rule] = {
    **_UNSUPPORTED,
    **_FIELDS,
    "messages": Of(list),
    "tools": Of(list),
    "tool_choice": Of(object),
    "parallel_tool_calls": Of(bool),
    "chat_template_kwargs": Of(dict),
    **{name: Of(str) for name in TEMPLATE_FIELDS},
    "logprobs": Of(bool),
    "top_logprobs": Number(int, 0, MAX_LOGPROBS),
    "modalities": OneOf((["text"],)),
    "prompt": _NEVER,
    "suffix": OneOf(("",)),
}
TEXT_FIELDS: Mapping[str, Rule] = {
    **_UNSUPPORTED,
    **_FIELDS,
    "prompt": Of(object),
    "suffix": Of(str),
    "logprobs": Number(int, 0, MAX_LOGPROBS),
    "messages": _NEVER,
    "tools": OneOf(([],)),
    "top_logprobs": OneOf((0,)),
}
STREAM_OPTIONS: Mapping[str, Rule] = {"include_usage": Of(bool)}
# A schema is always obeyed, strict or not.
SCHEMA_FIELDS: Mapping[str, Rule] = {
    "name": Of(str),
    "description": Of(str),
    "strict": Of(bool),
    "schema": Of(object),
}


def read_fields(
    fields: dict[str, Any], rules: Mapping[str, Rule]
) -> tuple[dict[str, Any], list[str]]:
    """Reads the fields of a request.

    Args:
        fields: Names and values as the client sent them. ``null`` counts as absent.
        rules: What the fields with an effect may hold.

    Returns:
        The fields that have an effect, and the names of the others.

    Raises:
        ApiError: If a field holds what its rule forbids.
    """
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in fields.items():
        if value is None:
            continue
        if name not in rules:
            ignored.append(name)
            continue
        read = rules[name].read(name, value)
        if read is not None:
            values[name] = read
    return values, ignored


def read_all_fields(fields: dict[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Reads fields as `read_fields` does, where each field would have an effect.

    Raises:
        ApiError: If a field is unknown or not allowed; it names the field.
    """
    values, unknown = read_fields(fields, rules)
    for name in unknown:
        raise ApiError(f"{shortened(name)} is not a field of this server.", name[:80])
    return values


def shortened(value: Any) -> str:
    """A value as it fits into a sentence."""
    text = str(value)
    return text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}…"
