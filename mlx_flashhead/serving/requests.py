"""Requests: fields that have been read, checked with the model and with the server's flags."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..structured.grammar import Grammar
from .answer_text import stop_machine
from .api_errors import ApiError, field_error
from .bodies import check_size, read_json
from .completion_fields import (
    MAX_CHOICES,
    SCHEMA_WORDS,
    ChatFields,
    Fields,
    ResponseFormat,
    Schema,
    TextFields,
    read_fields,
)
from .fields import MAX_NAME
from .served_models import ServedModel, find_model
from .tool_calls import RequestedTools, read_tools

# Characters of a schema, an expression or a grammar; OpenAI's limit for a schema is of this size.
MAX_FORM_CHARACTERS = 100_000
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
# Below it a draw is the likeliest token, but for overflows.
_MIN_TEMPERATURE = 1e-6
# A larger one has the same effect, and would be infinite in float16.
_MAX_BIAS = 1e4


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
        self.messages: list[dict[str, Any]] = []
        self.prompts: list[str | list[int]] = []
        self.tools = RequestedTools([], [])
        self.template_settings: dict[str, Any] = {}
        self.logprobs: int | None = None
        self.fields: Any
        if chat:
            self.fields, self.ignored = read_fields(body, ChatFields)
            self._take_chat(self.fields, body["messages"])
        else:
            self.fields, self.ignored = read_fields(body, TextFields)
            self.prompts = _prompts(self.fields, served)
            self.logprobs = self.fields.logprobs
        if self.fields.stream_options is not None and not self.fields.stream:
            self.ignored.append("stream_options")
        self.stop = stop_machine(self._stops())
        self.grammar = _grammar(self.fields)
        self.fields.logit_bias = _logit_bias(self.fields, served)
        self.escape_control_tokens: bool = flags.escape_control_tokens
        _settle(self.fields, served, flags)

    def _take_chat(self, fields: ChatFields, messages: list[dict[str, Any]]) -> None:
        """Takes what only chats have. The messages are as the client sent them."""
        served = self.served
        self.messages = _template_messages(messages, served.takes_developer)
        self.tools = read_tools(
            fields.tools, fields.tool_choice, served, several=fields.parallel_tool_calls
        )
        self.template_settings, unread = _template_settings(fields, served)
        self.ignored += unread
        if fields.logprobs:
            self.logprobs = fields.top_logprobs or 0
        elif fields.top_logprobs:
            raise field_error("top_logprobs", "needs logprobs to be true.")

    def _stops(self) -> list[str]:
        """The texts before which an answer ends."""
        stops = self.fields.stop
        if isinstance(stops, str):
            stops = [stops]
        if not self.chat and self.fields.suffix:
            stops = stops + self.served.middle_ends
        return stops


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
    if fields.top_p == 0 or fields.temperature < _MIN_TEMPERATURE:
        fields.temperature = 0.0
    if fields.top_k >= served.vocab_size:
        # 0 stands for all tokens.
        fields.top_k = 0
    if fields.dense is None:
        fields.dense = served.settings.dense and fields.n_probes is None
    if fields.n_probes is not None:
        _check_probes(fields, served)


def _check_probes(fields: Fields, served: ServedModel) -> None:
    """Raises an ApiError if a request's number of probes cannot be followed."""
    if fields.dense:
        raise ApiError("dense scores every token: leave n_probes out.", "n_probes")
    if served.head is None:
        raise ApiError("This model has no FlashHead: leave n_probes out.", "n_probes")
    n_clusters = served.head.n_clusters
    if fields.n_probes not in range(1, n_clusters + 1):
        raise field_error(
            "n_probes", f"is {fields.n_probes}: it must be a whole number, 1 to {n_clusters}."
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
    _check_arguments(messages)
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


def _check_arguments(messages: list[dict[str, Any]]) -> None:
    """Checks the size of the JSON within JSON, of all calls' arguments together."""
    texts = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments")
            if isinstance(arguments, str):
                texts.append(arguments)
    check_size(",".join(texts).encode())


def _template_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call with its arguments as an object: templates write them as JSON."""
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        arguments = read_arguments(arguments, where)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def read_arguments(text: str, where: str) -> Any:
    """Reads a call's arguments, JSON within JSON, whose size is checked; an ApiError if it is none.

    Args:
        text: The JSON; an empty text stands for no arguments.
        where: The field that has the call, for the error.
    """
    try:
        return read_json((text or "{}").encode())
    except ValueError as error:
        raise field_error(where, f"must have arguments in JSON, but {error}.") from None


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
    forms = []
    if fields.regex is not None:
        forms.append(_Form("regex", fields.regex, Grammar.from_regex))
    if fields.grammar is not None:
        forms.append(_Form("grammar", fields.grammar, Grammar.from_lark))
    if fields.response_format is not None and fields.response_format.type != "text":
        forms.append(_described_form(fields.response_format))
    if not forms:
        return None
    if len(forms) > 1:
        raise ApiError(
            "An answer has one form: give response_format, regex or grammar.", "response_format"
        )
    form = forms[0]
    field = form.path.partition(".")[0]
    if len(json.dumps(form.text)) > MAX_FORM_CHARACTERS:
        raise field_error(field, f"is longer than {MAX_FORM_CHARACTERS:,} characters: simplify it.")
    try:
        return form.make(form.text)
    except ValueError as error:
        raise ApiError(f"{form.path}: {error}", field) from None


class _Form(NamedTuple):
    """The form that a field asks for: its path in the request, its text, and what reads that."""

    path: str
    text: Any
    make: Callable[[Any], Grammar]


def _described_form(asked: ResponseFormat) -> _Form:
    """The form that a ``response_format`` asks for; an ApiError if it is not described."""
    path = f"response_format.{asked.type}"
    if asked.type == "json_object":
        return _Form(f"{path}.schema", Schema("any").schema, Grammar.from_json_schema)
    if asked.type == "json_schema":
        if asked.json_schema is None:
            raise ApiError(f"{path} is missing: it must be {SCHEMA_WORDS}.", "response_format")
        return _Form(f"{path}.schema", asked.json_schema.schema, Grammar.from_json_schema)
    described = asked.regex
    make: Callable[[str], Grammar] = Grammar.from_regex
    if asked.type == "grammar":
        described = asked.grammar
        make = Grammar.from_lark
    if described is None:
        raise ApiError(f"{path} is missing: it must be a text.", "response_format")
    return _Form(path, described, make)


def _template_settings(fields: ChatFields, served: ServedModel) -> tuple[dict[str, Any], list[str]]:
    """The variables that a request gives to the chat template, and fields that it does not read."""
    settings = {}
    unread = []
    for name in TEMPLATE_FIELDS:
        value = getattr(fields, name)
        if value is None:
            continue
        if name in served.template_settings:
            settings[name] = value
        else:
            unread.append(name)
    for name, value in fields.chat_template_kwargs.items():
        reason = ""
        if name not in served.template_settings:
            takes = ", ".join(sorted(served.template_settings)) or "none"
            reason = f"is not a setting of this model's chat template, which takes: {takes}"
        elif not isinstance(value, bool | int | float | str):
            reason = "must be true, false, a number or a text"
        if reason:
            field = "chat_template_kwargs"
            raise ApiError(f"{field}.{name:.{MAX_NAME}} {reason}.", field)
        settings[name] = value
    return settings, unread


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
