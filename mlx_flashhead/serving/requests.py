"""Checks requests: every field has OpenAI's meaning, or is an error."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from ..models.compat.mlx_lm import TextStateMachine
from ..structured.grammar import Grammar
from .responses import ApiError, loads
from .served_models import ServedModel

MAX_CHOICES = 16  # texts of a request: n times the number of its prompts
MAX_LOGPROBS = 20
# Characters of a schema, an expression or a grammar; OpenAI's limit for a schema is of this size.
MAX_CHARACTERS = 100_000
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 1000
_MAX_BIAS = 1e4  # a larger one has the same effect, and would be infinite in float16
_MIN_TEMPERATURE = 1e-6  # below it a draw is the likeliest token, but for overflows
_PENALTIES = ("repetition", "presence", "frequency")

_TYPES = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
_COUNT, _SHARE = (int, 0, 2**31 - 1), (float, 0, 1)
# Of each field its type, a number's type and limits, or the only values that it may have.
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("model", "stop", "response_format", "regex", "grammar"), object),
    **dict.fromkeys(("stream", "dense"), bool),
    **dict.fromkeys(("stream_options", "logit_bias"), dict),
    "n": (int, 1, MAX_CHOICES),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), (int, 1, 2**31 - 1)),
    "temperature": (float, 0, 2),  # as OpenAI's
    "top_k": _COUNT,
    **dict.fromkeys(("top_p", "min_p", "xtc_probability"), _SHARE),
    "xtc_threshold": (float, 0, 0.5),
    "repetition_penalty": (float, 0, 1e30),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (float, -1e30, 1e30)),
    **dict.fromkeys((f"{kind}_context_size" for kind in _PENALTIES), _COUNT),
    "seed": (int, -(2**63), 2**64 - 1),
    "num_draft_tokens": (int, 1, 64),
    # labels, without effect
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key"), object),
    "store": [False],
    "service_tier": ["auto", "default"],
}
_CHAT_FIELDS: dict[str, Any] = _FIELDS | {
    **dict.fromkeys(("messages", "tools"), list),
    "tool_choice": ["auto", "none"],
    "chat_template_kwargs": dict,
    "logprobs": bool,
    "top_logprobs": (int, 0, MAX_LOGPROBS),
    "modalities": [["text"]],
    "parallel_tool_calls": [True],
}
_TEXT_FIELDS: dict[str, Any] = _FIELDS | {
    "prompt": object,
    "logprobs": (int, 0, MAX_LOGPROBS),
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
}
_STREAM_OPTIONS = {"include_usage": bool, "include_obfuscation": [False]}
# A schema is always obeyed, strict or not.
_SCHEMA_FIELDS = {"name": str, "description": str, "strict": bool, "schema": object}


class Request:
    """A checked request, of its JSON and the server's flags. An ApiError names a wrong field."""

    def __init__(self, body: dict, *, chat: bool, models: Sequence[ServedModel], flags: Namespace):
        self.chat = chat  # otherwise it continues texts
        self.served = served = find_model(models, body.get("model"))
        n_clusters = served.head.n_clusters if served.head else 2**31 - 1
        known = _CHAT_FIELDS if chat else _TEXT_FIELDS
        fields = _checked(body, known | {"n_probes": (int, 1, n_clusters)})
        get = fields.get

        self.stream: bool = get("stream", False)
        if "stream_options" in fields and not self.stream:
            raise wrong("stream_options", "are for requests with stream.")
        options = _checked(get("stream_options", {}), _STREAM_OPTIONS)
        self.include_usage: bool = options.get("include_usage", False)  # at the end of a stream
        self.messages = _messages(get("messages")) if chat else []
        self.prompts = [] if chat else _prompts(get("prompt"), served)  # texts or token ids
        self.n: int = get("n", 1)  # answers to each prompt
        if (n_texts := self.n * len(self.prompts)) > MAX_CHOICES:
            most = f"at most {MAX_CHOICES} texts are made for a request"
            raise ApiError(f"n times the number of prompts is {n_texts}: {most}.", "n")
        # of an answer; the context may leave room for fewer
        self.max_tokens: int = get("max_completion_tokens", get("max_tokens", flags.max_tokens))
        ends = [(text, None) for text in _stop(get("stop", []))]  # texts before which it ends
        self.stop = TextStateMachine({"normal": ends} if ends else None)
        self.form = _form(fields)  # of an answer; None for any text
        self.tools = _tools(fields, served)
        if self.form is not None and self.tools:
            conflict = "An answer with a response_format calls no tools: leave tools out."
            raise ApiError(conflict, "tools")
        self.template_settings = _template_settings(get("chat_template_kwargs", {}), served)

        self.n_probes: int | None = get("n_probes")  # None: the head's number
        self.dense: bool = get("dense", served.dense and self.n_probes is None)
        if self.n_probes is not None and (self.dense or served.head is None):
            reason = "dense scores every token" if self.dense else "This model has no FlashHead"
            raise ApiError(f"{reason}: leave n_probes out.", "n_probes")
        self.num_draft_tokens: int = get("num_draft_tokens", flags.num_draft_tokens)
        # of so many likeliest tokens beside each token's; None: of none
        self.logprobs: int | None = get("logprobs")
        if chat:
            if "top_logprobs" in fields and not self.logprobs:
                raise wrong("top_logprobs", "needs logprobs to be true.")
            self.logprobs = get("top_logprobs", 0) if self.logprobs else None
        self.seed: int | None = get("seed")
        temp, top_k = get("temperature", flags.temp), get("top_k", flags.top_k)
        top_p, tokenizer = get("top_p", flags.top_p), served.tokenizer
        self.sampling = {  # arguments of make_sampler, without the seed
            "temp": 0.0 if top_p == 0 or temp < _MIN_TEMPERATURE else temp,  # 0: the likeliest
            "top_p": top_p,
            "top_k": top_k if top_k < served.vocab_size else 0,  # that of all tokens cuts none off
            "min_p": get("min_p", flags.min_p),
            "xtc_probability": get("xtc_probability", 0.0),
            "xtc_threshold": get("xtc_threshold", 0.1),
            "xtc_special_tokens": [*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        }
        self.penalties: dict[str, Any] = {  # arguments of mlx-lm's make_logits_processors
            "logit_bias": _logit_bias(get("logit_bias", {}), served)
        }
        for kind in _PENALTIES:
            self.penalties[f"{kind}_penalty"] = get(f"{kind}_penalty", 0.0)
            self.penalties[f"{kind}_context_size"] = get(f"{kind}_context_size", 20)


def wrong(field: str, why: str) -> ApiError:
    """The error of a wrong field: a sentence that begins with the field's name."""
    return ApiError(f"{field} {why}", field)


def find_model(models: Sequence[ServedModel], name: Any) -> ServedModel:
    """The served model of that name; the first without a name."""
    if name in (None, "default_model"):  # mlx-lm's word for the model of --model
        return models[0]
    by_name = {known: served for served in models for known in served.names}
    if not isinstance(name, str) or name not in by_name:
        refusal = f"No model of that name is served here: choose {' or '.join(by_name)}."
        raise ApiError(refusal, "model", status=404, code="model_not_found")
    return by_name[name]


def _checked(fields: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null. An ApiError names one that is unknown or not as ``known``."""
    checked: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in known:
            raise ApiError(f"{_short(name)} is not a field of this server.", name[:80])
        match known[name]:
            case list(values):
                if not any(value == v and type(value) is type(v) for v in values):
                    only = " or ".join(map(json.dumps, values))
                    raise wrong(name, f"is {_short(value)}: here it can be {only}, or left out.")
            case (kind, low, high):
                if type(value) not in (int, kind) or not low <= value <= high:
                    number = "a whole number" if kind is int else "a number"
                    raise wrong(name, f"is {_short(value)}: it must be {number}, {low} to {high}.")
                value = kind(value)
            case kind:
                if not isinstance(value, kind):
                    raise wrong(name, f"must be {_TYPES[kind]}.")
        checked[name] = value
    return checked


def _logit_bias(biases: dict[str, Any], served: ServedModel) -> dict[int, float] | None:
    bias = {}
    for key, value in biases.items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token < served.vocab_size or type(value) not in (int, float):
            last = served.vocab_size - 1
            raise wrong("logit_bias", f"must give each token id a number: choose 0 to {last}.")
        bias[token] = float(max(-_MAX_BIAS, min(_MAX_BIAS, value)))
    return bias or None


def _stop(stop: Any) -> tuple[str, ...]:
    words = [stop] if isinstance(stop, str) else stop
    sound = isinstance(words, list) and len(words) <= _MAX_STOPS
    if not sound or not all(
        isinstance(word, str) and 0 < len(word) <= _MAX_STOP_CHARACTERS for word in words
    ):
        most = f"at most {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_CHARACTERS:,} characters"
        raise wrong("stop", f"must be a text or a list of {most}.")
    return tuple(words)


def _form(fields: dict[str, Any]) -> Grammar | None:
    """The form of the answer: ``regex`` or ``grammar``, alone or within ``response_format``."""
    # each with its place in the request, what makes it, and what describes it
    makers: dict[str, Any] = {"regex": Grammar.from_regex, "grammar": Grammar.from_lark}
    forms = [(kind, make, fields[kind]) for kind, make in makers.items() if kind in fields]
    field = "response_format"
    if (value := fields.get(field)) is not None:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (kinds := ("text", "json_object", "json_schema", *makers)):
            raise wrong(field, f"must be an object with a type: {', '.join(kinds)}.")
        where, described = f"{field}.{kind}", _checked(value, {"type": str, kind: object}).get(kind)
        if kind == "json_object":
            forms.append((where, Grammar.from_json_schema, {"type": "object"}))
        elif kind == "json_schema":
            if not isinstance(described, dict) or not described.get("name"):
                raise ApiError(f'{where} must be an object with a "name" and a "schema".', field)
            schema = _checked(described, _SCHEMA_FIELDS).get("schema", {"type": "object"})
            forms.append((f"{where}.schema", Grammar.from_json_schema, schema))
        elif kind != "text":
            forms.append((where, makers[kind], described))
    if len(forms) > 1:
        raise ApiError("An answer has one form: give response_format, regex or grammar.", field)
    for where, make, value in forms:
        field = where.partition(".")[0]
        if len(json.dumps(value)) > MAX_CHARACTERS:
            raise wrong(field, f"is longer than {MAX_CHARACTERS:,} characters: simplify it.")
        try:
            return make(value)
        except ValueError as error:
            raise ApiError(f"{where}: {error}", field) from None
    return None


def _tools(fields: dict[str, Any], served: ServedModel) -> list[dict[str, Any]]:
    tools = fields.get("tools", [])
    for i, tool in enumerate(tools):
        sound = isinstance(tool, dict) and tool.get("type") == "function"
        function = tool.get("function") if sound else None
        if not isinstance(function, dict) or not function.get("name"):
            form = '{"type": "function", "function": …}, whose function has a name'
            raise ApiError(f"tools[{i}] must be {form}.", "tools")
    if tools and not served.tokenizer.has_tool_calling:
        raise ApiError("This model's chat template knows no tools: leave them out.", "tools")
    return tools if fields.get("tool_choice") != "none" else []


def _template_settings(settings: dict[str, Any], served: ServedModel) -> dict[str, Any]:
    field, known = "chat_template_kwargs", served.template_settings
    for name, value in settings.items():
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            reason = f"is not a setting of this model's chat template, which takes: {takes}."
            raise ApiError(f"{field}.{name[:40]} {reason}", field)
        if not isinstance(value, bool | int | float | str):
            plain = "must be true, false, a number or a text."
            raise ApiError(f"{field}.{name[:40]} {plain}", field)
    return settings


def _prompts(prompts: Any, served: ServedModel) -> list[str | list[int]]:
    """The texts or token ids to continue."""
    last = served.vocab_size - 1

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int and 0 <= i <= last for i in value)

    if isinstance(prompts, str) or (prompts and are_tokens(prompts)):
        prompts = [prompts]
    sound = isinstance(prompts, list) and prompts
    if not sound or not all(isinstance(prompt, str) or are_tokens(prompt) for prompt in prompts):
        which = f"token ids: choose 0 to {last}"
        raise wrong("prompt", f"must be a text, a list of texts, or {which}.")
    return prompts


def _messages(messages: list[Any] | None) -> list[dict[str, Any]]:
    """The messages in the form of chat templates: each content a text, each argument an object."""
    read = []
    for i, message in enumerate(messages or [None]):
        where = f"messages[{i}]" if messages else "messages"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            example = '{"role": "user", "content": "…"}'
            raise ApiError(f"messages must be a list of at least one {example}.", where)
        message = {name: value for name, value in message.items() if value is not None}
        message["content"] = _text(message.get("content", ""), f"{where}.content")
        if "tool_calls" in message:
            message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        read.append(message)
    return read


def _text(content: Any, where: str) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, list) else [None]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise wrong(where, 'must be a text, or a list of {"type": "text", "text": "…"}.')
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls, with arguments as objects: templates write them as JSON themselves."""
    read = []
    for call in calls if isinstance(calls, list) else [{}]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(where, "must be a list of calls, each with a function that has a name.")
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str):
                arguments = loads((arguments or "{}").encode())
        except ValueError as error:
            raise wrong(where, f"must have arguments in JSON, but {error}.") from None
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
