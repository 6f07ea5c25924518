"""Requests: a field has OpenAI's meaning, or changes nothing, or is an error.

A field's type, its limits and its default stand where it is declared. What depends on the model or
on the server's flags is checked in `Request`.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..structured.grammar import Grammar
from .answer_text import stop_machine
from .api_errors import ApiError, field_error
from .bodies import check_size, read_json
from .fields import (
    MAX_NAME,
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
from .served_models import ServedModel
from .tool_calls import RequestedTools, read_tools

MAX_CHOICES = 16  # texts of a request: n times the number of its prompts
MAX_LOGPROBS = 20
# Characters of a schema, an expression or a grammar; OpenAI's limit for a schema is of this size.
MAX_CHARACTERS = 100_000
# Variables of chat templates that are also fields of an API.
TEMPLATE_FIELDS = ("reasoning_effort", "verbosity", "enable_thinking")
# Fields that have the defaults of flags, by the flags.
_OF_FLAGS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "num_draft_tokens": "num_draft_tokens",
    "max_tokens": "max_tokens",
}
_MIN_TEMPERATURE = 1e-6  # below it a draw is the likeliest token, but for overflows
_MAX_BIAS = 1e4  # a larger one has the same effect, and would be infinite in float16

Penalty = Annotated[float, Meta(ge=-1e30, le=1e30)]


class StreamOptions(Struct):
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


_SCHEMA_WORDS = 'an object with a "name" and a "schema"'


class _Schema(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1)]
    schema: Any = msgspec.field(default_factory=lambda: {"type": "object"})
    description: str | None = None
    strict: bool | None = None  # it is obeyed in any case


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """The form of an answer, described in the field that has the name of its type."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: Annotated[_Schema | None, Meta(description=_SCHEMA_WORDS)] = None
    regex: str | None = None
    grammar: str | None = None


class Fields(Struct, kw_only=True):
    """The fields of chats and of texts. None stands for the server's default."""

    model: Any = None
    stream: bool = False
    stream_options: Annotated[
        StreamOptions | None, Meta(description='an object such as {"include_usage": true}')
    ] = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1  # answers to each prompt
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    stop: Annotated[
        StopText | StopTexts,
        Meta(description="a text or a list of at most 16 texts, each of 1 to 1,000 characters"),
    ] = []
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Count | None = None  # 0: all tokens
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
_MAKERS: dict[str, Callable[[Any], Grammar]] = {
    "regex": Grammar.from_regex,
    "grammar": Grammar.from_lark,
}


def read_fields(body: Mapping[str, Any], kind: type[Fields]) -> tuple[Any, list[str]]:
    """Reads the fields of a request.

    Args:
        body: Names and values as the client sent them. ``null`` counts as absent.
        kind: The fields that have an effect.

    Returns:
        The fields, and the names of those without effect.

    Raises:
        ApiError: If a field has a wrong value, or would have an effect elsewhere.
    """
    unlimited = {name: kept for name, kept in _MINUS_ONE.items() if body.get(name) == -1}
    values = without_nulls({**body, **unlimited})
    further = [name for name in values if name not in kind.__struct_fields__]
    for name in further:
        if name in _ELSEWHERE:
            _check_neutral(name, values[name])
    fields = read_struct(values, kind)
    return fields, [name for name in further if name not in _ELSEWHERE]


def _check_neutral(name: str, value: Any) -> None:
    """Raises an ApiError if a field would change the answer of another server."""
    neutral = _ELSEWHERE[name]
    if not neutral:
        raise field_error(name, "cannot be followed here: leave it out.")
    if not any(value == known and type(value) is type(known) for known in neutral):
        allowed = " or ".join(json.dumps(known) for known in neutral)
        raise field_error(name, f"is {shown(value)}: here it can be {allowed}, or left out.")


class Request:
    """A checked request.

    Args:
        body: The JSON object of the client.
        chat: Whether it is a chat. Otherwise it continues texts.
        models: The models that are served, the default first.
        flags: The server's flags, which have the defaults.
        any_model: Whether a name that is not served stands for the only model.

    Attributes:
        fields: Those that have an effect, of chats or of texts.
        ignored: The names of those that have none.
        served: The model that the request names.
        messages: A chat's messages.
        prompts: Texts or token ids to continue.
        stop: Texts before which an answer ends.
        grammar: What an answer follows; None for any text.
        logprobs: The number of likeliest tokens beside each chosen one; None: no logprobs.
        escape_control_tokens: Whether those in texts of users and tools are read as text.

    Raises:
        ApiError: If a field cannot be followed. The error names the field.
    """

    def __init__(
        self,
        body: dict[str, Any],
        *,
        chat: bool,
        models: Sequence[ServedModel],
        flags: Namespace,
        any_model: bool = False,
    ):
        self.chat = chat
        names_any = flags.any_model or (any_model and len(models) == 1)
        served = find_model(models, body.get("model"), or_first=names_any)
        self.served = served
        fields, self.ignored = read_fields(body, ChatFields if chat else TextFields)
        self.fields = fields
        if fields.stream_options is not None and not fields.stream:
            self.ignored.append("stream_options")
        self.messages: list[dict[str, Any]] = []
        self.prompts: list[str | list[int]] = []
        self.tools = RequestedTools([], [])
        self.template_settings: dict[str, Any] = {}
        self.logprobs: int | None = fields.logprobs
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop
        if chat:
            self.messages = _template_messages(body["messages"], served.takes_developer)
            self.tools = read_tools(
                fields.tools, fields.tool_choice, served, several=fields.parallel_tool_calls
            )
            self.template_settings, unread = _template_settings(fields, served)
            self.ignored += unread
            if fields.top_logprobs and not fields.logprobs:
                raise field_error("top_logprobs", "needs logprobs to be true.")
            self.logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        else:
            self.prompts = _prompts(fields, served)
            stops = [*stops, *(served.middle_ends if fields.suffix else ())]
        self.stop = stop_machine(stops)
        self.grammar = _grammar(fields)
        fields.logit_bias = _logit_bias(fields, served)
        self.escape_control_tokens: bool = flags.escape_control_tokens
        _settle(fields, served, flags)


def _settle(fields: Any, served: ServedModel, flags: Namespace) -> None:
    """Gives fields that depend on each other, on the model or on the flags their values."""
    limits = {fields.max_tokens, fields.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            "max_completion_tokens and max_tokens are two names of one limit, and they differ: "
            "send one of them.",
            "max_tokens",
        )
    fields.max_tokens = next(iter(limits), None)
    for flag, name in _OF_FLAGS.items():
        if getattr(fields, name) is None:
            setattr(fields, name, getattr(flags, flag))
    takes_likeliest = fields.top_p == 0 or fields.temperature < _MIN_TEMPERATURE
    fields.temperature = 0.0 if takes_likeliest else fields.temperature
    fields.top_k = 0 if fields.top_k >= served.vocab_size else fields.top_k  # 0: all tokens
    n_probes = fields.n_probes
    if fields.dense is None:
        fields.dense = served.settings.dense and n_probes is None
    if n_probes is None:
        return
    if fields.dense or served.head is None:
        reason = "dense scores every token" if fields.dense else "This model has no FlashHead"
        raise ApiError(f"{reason}: leave n_probes out.", "n_probes")
    n_clusters = served.head.n_clusters
    if not 1 <= n_probes <= n_clusters:
        raise field_error(
            "n_probes", f"is {n_probes}: it must be a whole number, 1 to {n_clusters}."
        )


def find_model(models: Sequence[ServedModel], name: Any, *, or_first: bool = False) -> ServedModel:
    """Returns the served model of that name; the first without a name.

    Args:
        models: The models, the default first.
        name: What a client sent.
        or_first: Whether the first one has any other name too.

    Raises:
        ApiError: If no served model has the name.
    """
    if name in (None, "default_model"):  # mlx-lm's word for the model of --model
        return models[0]
    by_name = {known: served for served in models for known in served.names}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    if or_first:
        return models[0]
    raise unknown_model(list(by_name))


def unknown_model(names: Sequence[str]) -> ApiError:
    """The error of a model that is not among the served ones."""
    return ApiError(
        f"No model of that name is served here: choose {' or '.join(names)}.",
        "model",
        status=404,
        code="model_not_found",
    )


def _template_messages(
    messages: list[dict[str, Any]], takes_developer: bool
) -> list[dict[str, Any]]:
    """Messages as templates take them: each content is a text, arguments of calls are objects.

    Args:
        messages: Checked messages, as the client sent them.
        takes_developer: Whether the template knows the role "developer". Otherwise it becomes
            "system", which OpenAI's name stands for.
    """
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    texts = [each["arguments"] for each in calls if isinstance(each.get("arguments"), str)]
    check_size(",".join(texts).encode())  # JSON within JSON, of all calls together
    read = []
    for i, message in enumerate(messages):
        message = {name: value for name, value in message.items() if value is not None}
        if message["role"] == "developer" and not takes_developer:
            message["role"] = "system"
        content = message.get("content", "")
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        message["content"] = content
        if "tool_calls" in message:
            where = f"messages[{i}].tool_calls"
            message["tool_calls"] = [_template_call(call, where) for call in message["tool_calls"]]
        read.append(message)
    return read


def _template_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call with its arguments as an object: templates write them as JSON."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = read_json((arguments or "{}").encode())
        except ValueError as error:
            raise field_error(where, f"must have arguments in JSON, but {error}.") from None
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _prompts(fields: TextFields, served: ServedModel) -> list[str | list[int]]:
    """The texts or token ids to continue."""
    prompts = fields.prompt
    last = served.vocab_size - 1

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int and 0 <= i <= last for i in value)

    if isinstance(prompts, str) or (prompts and are_tokens(prompts)):
        prompts = [prompts]
    is_list = isinstance(prompts, list) and prompts
    if is_list and fields.n * len(prompts) > MAX_CHOICES:
        raise ApiError(
            f"n times the number of prompts is {fields.n * len(prompts)}: at most {MAX_CHOICES} "
            "texts are made for a request.",
            "n",
        )
    if not is_list or not all(isinstance(prompt, str) or are_tokens(prompt) for prompt in prompts):
        raise field_error(
            "prompt", f"must be a text, a list of texts, or token ids: choose 0 to {last}."
        )
    if not fields.suffix:
        return prompts
    if served.middle is None:
        raise field_error(
            "suffix",
            "needs a model with fill-in-the-middle tokens, and this one has none: leave it out.",
        )
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise field_error("suffix", "needs prompts that are texts, not token ids.")
    return [served.middle.prompt(prompt, fields.suffix) for prompt in prompts]


def _grammar(fields: Fields) -> Grammar | None:
    """What ``response_format``, ``regex`` or ``grammar`` asks for; an ApiError for two of them."""
    forms: dict[str, Any] = {"regex": fields.regex, "grammar": fields.grammar}
    if fields.response_format is not None:
        forms |= _described_form(fields.response_format)
    wanted = [(where, form) for where, form in forms.items() if form is not None]
    if len(wanted) > 1:
        raise ApiError(
            "An answer has one form: give response_format, regex or grammar.", "response_format"
        )
    for where, form in wanted:
        field = where.partition(".")[0]
        make = _MAKERS.get(where.rpartition(".")[2], Grammar.from_json_schema)
        if len(json.dumps(form)) > MAX_CHARACTERS:
            raise field_error(field, f"is longer than {MAX_CHARACTERS:,} characters: simplify it.")
        try:
            return make(form)
        except ValueError as error:
            raise ApiError(f"{where}: {error}", field) from None
    return None


def _described_form(asked: ResponseFormat) -> dict[str, Any]:
    """The form that a ``response_format`` asks for, by its place; none for any text.

    Raises:
        ApiError: If it is not described.
    """
    if asked.type == "text":
        return {}
    where = f"response_format.{asked.type}"
    described = _Schema("any") if asked.type == "json_object" else getattr(asked, asked.type)
    if described is None:
        wanted = _SCHEMA_WORDS if asked.type == "json_schema" else "a text"
        raise ApiError(f"{where} is missing: it must be {wanted}.", "response_format")
    if isinstance(described, _Schema):
        return {f"{where}.schema": described.schema}
    return {where: described}


def _template_settings(fields: ChatFields, served: ServedModel) -> tuple[dict[str, Any], list[str]]:
    """The variables that a request gives to the chat template, and fields that it does not read."""
    taken = served.template_settings
    given = {name: getattr(fields, name) for name in TEMPLATE_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in fields.chat_template_kwargs.items():
        reason = ""
        if name not in taken:
            takes = ", ".join(sorted(taken)) or "none"
            reason = f"is not a setting of this model's chat template, which takes: {takes}"
        elif not isinstance(value, bool | int | float | str):
            reason = "must be true, false, a number or a text"
        if reason:
            field = "chat_template_kwargs"
            raise ApiError(f"{field}.{name:.{MAX_NAME}} {reason}.", field)
    settings = {name: value for name, value in given.items() if name in taken}
    return settings | fields.chat_template_kwargs, [name for name in given if name not in taken]


def _logit_bias(fields: Fields, served: ServedModel) -> dict[int, float]:
    """The numbers to add to logits, by token id."""
    bias = {}
    for key, value in fields.logit_bias.items():
        is_number = key.isascii() and key.isdigit() and len(key) < 10
        if not is_number or int(key) >= served.vocab_size:
            raise field_error(
                "logit_bias",
                f"must give each token id a number: choose 0 to {served.vocab_size - 1}.",
            )
        bias[int(key)] = max(-_MAX_BIAS, min(_MAX_BIAS, value))
    return bias
