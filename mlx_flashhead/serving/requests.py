"""Checks requests: every field has OpenAI's meaning, or is an error."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..models.compat.mlx_lm import TextStateMachine
from ..structured.grammar import Grammar
from .api_error import ApiError, loads, wrong
from .served_models import ServedModel

# Greatest number of texts of a request: n times the number of its prompts.
MAX_CHOICES = 16
MAX_LOGPROBS = 20
# Characters of a schema, an expression or a grammar; OpenAI's limit for a schema is of this size.
MAX_CHARACTERS = 100_000
_MAX_NUMBER = 1e30
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 1000
_MAX_BIAS = 1e4  # a larger one has the same effect, and would be infinite in float16
_MAX_TEMPERATURE = 2  # OpenAI's limit
_MIN_TEMPERATURE = 1e-6  # below it a draw is the likeliest token, but for overflows
_KINDS = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
_GRAMMARS: dict[str, Callable[[Any], Grammar]] = {
    "json_schema": Grammar.from_json_schema,
    "regex": Grammar.from_regex,
    "grammar": Grammar.from_lark,
}
_EXAMPLE = 'messages must be a list of at least one {"role": "user", "content": "…"}.'
_MAX_SETTING = 1000  # characters
# A client's labels, without effect.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Request:
    """A checked request."""

    served: ServedModel
    chat: bool  # otherwise it continues texts
    stream: bool
    include_usage: bool  # at the end of a stream
    n: int  # answers to each prompt
    max_tokens: int  # of an answer; the context may leave room for fewer
    sampling: dict[str, Any]  # arguments of make_sampler, without the seed
    penalties: dict[str, Any]  # arguments of mlx-lm's make_logits_processors
    form: Grammar | None  # of an answer; None for any text
    seed: int | None
    stop: tuple[str, ...]  # texts before which an answer ends
    n_probes: int | None  # None: the head's number
    dense: bool
    num_draft_tokens: int
    logprobs: int | None  # of so many likeliest tokens beside each token's; None: of none
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    template_settings: dict[str, Any]
    prompts: list[str | list[int]]  # texts or token ids to continue

    @cached_property
    def stop_machine(self) -> TextStateMachine:
        """Finds the texts of ``stop``, for all answers."""
        edges = [(text, None) for text in self.stop]
        return TextStateMachine({"normal": edges} if edges else None)


class _Fields:
    """A body whose fields are taken one by one, and checked. What is left at the end is unknown.

    A field that is null counts as missing. A :class:`ApiError` names the field.
    """

    def __init__(self, body: dict[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: type | None = None, default: Any = None) -> Any:
        """The field's value, of the type ``kind`` unless that is None."""
        value = self._left.pop(name, default)
        if kind is not None and value is not default and not isinstance(value, kind):
            raise wrong(name, f"must be {_KINDS[kind]}.")
        return value

    def whole(self, name: str, default: Any, low: int = 0, high: int = 2**31 - 1) -> Any:
        """A whole number within limits, or the default."""
        if (value := self.take(name)) is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise wrong(name, f"is {_short(value)}: it must be a whole number, {low} to {high}.")
        return value

    def number(self, name: str, default: float, low: float, high: float = _MAX_NUMBER) -> float:
        """A number within limits, or the default."""
        if (value := self.take(name)) is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, "must be a number.")
        if not low <= value <= high:
            limits = f"at least {low:g}" if high == _MAX_NUMBER else f"{low:g} to {high:g}"
            raise wrong(name, f"is {_short(value)}: it must be {limits}.")
        return float(value)

    def only(self, name: str, *values: Any, why: str) -> None:
        """Takes a field that may only have one of ``values``, and says ``why``."""
        value = self.take(name)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise ApiError(f"{name}: {why}", name)

    def end(self) -> None:
        for name in self._left:
            raise ApiError(f"{_short(name)} is not a field of this server.", name[:80])


def find_model(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    """The served model of that name; the first without a name."""
    if name in (None, "default_model"):  # mlx-lm's word for the model of --model
        return models[0]
    for served in models:
        if name in served.names:
            return served
    names = " or ".join(name for served in models for name in served.names)
    refusal = f"No model of that name is served here: choose {names}."
    raise ApiError(refusal, "model", status=404, code="model_not_found")


def read_request(
    body: dict[str, Any], *, chat: bool, models: Sequence[ServedModel], defaults: Namespace
) -> Request:
    """Checks a request's JSON: an ApiError names the field. The flags are the fields' defaults."""
    fields = _Fields(body)
    served = find_model(models, fields.take("model", str))
    stream = fields.take("stream", bool, False)
    max_tokens = fields.whole("max_tokens", None, 1)
    max_completion_tokens = fields.whole("max_completion_tokens", max_tokens, 1)
    if max_tokens not in (None, max_completion_tokens):
        both = f"is {max_tokens} and max_completion_tokens {max_completion_tokens}"
        raise wrong("max_tokens", f"{both}: give one of them.")
    request = Request(
        served,
        chat,
        stream,
        include_usage=_include_usage(fields.take("stream_options", dict), stream),
        n=fields.whole("n", 1, 1, MAX_CHOICES),
        max_tokens=max_completion_tokens or defaults.max_tokens,
        sampling=_sampling(fields, served, defaults),
        penalties=_penalties(fields, served),
        form=_form(fields),
        seed=fields.whole("seed", None, -(2**63), 2**64 - 1),
        stop=_stop(fields.take("stop", default=())),
        **_probes(fields, served),
        num_draft_tokens=fields.whole("num_draft_tokens", defaults.num_draft_tokens, 1, 64),
        logprobs=_logprobs(fields, chat),
        messages=_messages(fields.take("messages", list)) if chat else [],
        tools=_tools(fields, served) if chat else [],
        template_settings=_template_settings(fields, served) if chat else {},
        prompts=[] if chat else _prompts(fields.take("prompt"), served),
    )
    _reject_unsupported(fields, chat)
    fields.end()
    if request.form is not None and request.tools:
        raise ApiError("An answer with a response_format calls no tools: leave tools out.", "tools")
    if (n_texts := request.n * len(request.prompts)) > MAX_CHOICES:
        most = f"at most {MAX_CHOICES} texts are made for a request"
        raise ApiError(f"n times the number of prompts is {n_texts}: {most}.", "n")
    return request


def _include_usage(options: dict[str, Any] | None, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise wrong("stream_options", "are for requests with stream.")
    fields = _Fields(options)
    include_usage = fields.take("include_usage", bool, False)
    fields.only("include_obfuscation", False, why="chunks are sent as they are, so leave it out.")
    fields.end()
    return include_usage


def _sampling(fields: _Fields, served: ServedModel, defaults: Namespace) -> dict[str, Any]:
    top_k = fields.whole("top_k", defaults.top_k)
    top_p = fields.number("top_p", defaults.top_p, 0, 1)
    temp = fields.number("temperature", defaults.temp, 0, _MAX_TEMPERATURE)
    tokenizer = served.tokenizer
    return {
        "temp": 0.0 if top_p == 0 or temp < _MIN_TEMPERATURE else temp,  # 0: the likeliest token
        "top_p": top_p,
        "top_k": top_k if top_k < served.vocab_size else 0,  # a top_k of all tokens cuts none off
        "min_p": fields.number("min_p", defaults.min_p, 0, 1),
        "xtc_probability": fields.number("xtc_probability", 0.0, 0, 1),
        "xtc_threshold": fields.number("xtc_threshold", 0.1, 0, 0.5),
        "xtc_special_tokens": [*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    }


def _penalties(fields: _Fields, served: ServedModel) -> dict[str, Any]:
    penalties: dict[str, Any] = {}
    for kind, low in (("repetition", 0), ("presence", -_MAX_NUMBER), ("frequency", -_MAX_NUMBER)):
        penalties[f"{kind}_penalty"] = fields.number(f"{kind}_penalty", 0.0, low)
        penalties[f"{kind}_context_size"] = fields.whole(f"{kind}_context_size", 20)
    bias = {}
    for key, value in fields.take("logit_bias", dict, {}).items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token < served.vocab_size:
            known = f"this model has {served.vocab_size}: choose 0 to {served.vocab_size - 1}"
            raise wrong("logit_bias", f"names the token {key[:20]}, but {known}.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong("logit_bias", "must give each token id a number.")
        bias[token] = float(max(-_MAX_BIAS, min(_MAX_BIAS, value)))
    return penalties | {"logit_bias": bias or None}


def _form(fields: _Fields) -> Grammar | None:
    """The form of the answer: ``regex`` or ``grammar``, alone or within ``response_format``."""
    field = "response_format"
    # each with its place in the request, its kind, and what describes it
    forms = [(kind, kind, fields.take(kind)) for kind in ("regex", "grammar")]
    forms.append(_response_format(fields.take(field), field))
    forms = [form for form in forms if form[2] is not None]
    if len(forms) > 1:
        raise ApiError("An answer has one form: give response_format, regex or grammar.", field)
    for where, kind, value in forms:
        field = where.partition(".")[0]
        if len(json.dumps(value)) > MAX_CHARACTERS:
            most = f"is longer than {MAX_CHARACTERS:,} characters: simplify it."
            raise ApiError(f"{where} {most}", field)
        try:
            return _GRAMMARS[kind](value)
        except ValueError as error:
            raise ApiError(f"{where}: {error}", field) from None
    return None


def _response_format(value: Any, field: str) -> tuple[str, str, Any]:
    if value is None:
        return field, "text", None
    kinds = ("text", "json_object", *_GRAMMARS)
    if not isinstance(value, dict) or (kind := value.get("type")) not in kinds:
        raise wrong(field, f"must be an object with a type: {', '.join(kinds)}.")
    fields, where = _Fields(value), f"{field}.{kind}"
    fields.take("type")
    described = fields.take(kind) if kind in _GRAMMARS else None
    fields.end()
    if kind == "json_object":
        return field, "json_schema", {"type": "object"}
    if kind == "json_schema":
        if not isinstance(described, dict):
            raise ApiError(f'{where} must be an object with a "name" and a "schema".', field)
        fields = _Fields(described)
        if not fields.take("name", str):
            raise ApiError(f"{where}.name is missing.", field)
        fields.take("description", str)
        fields.take("strict", bool)  # a schema is always kept to
        where, described = f"{where}.schema", fields.take("schema", default={"type": "object"})
        fields.end()
    elif described is None and kind != "text":
        raise ApiError(f"{where} is missing.", field)
    return where, kind, described


def _stop(stop: Any) -> tuple[str, ...]:
    words = [stop] if isinstance(stop, str) else stop
    sound = isinstance(words, list | tuple) and len(words) <= _MAX_STOPS
    if not sound or not all(isinstance(word, str) and word for word in words):
        most = f"a list of at most {_MAX_STOPS} texts, none of them empty"
        raise wrong("stop", f"must be a text or {most}.")
    if (longest := max(map(len, words), default=0)) > _MAX_STOP_CHARACTERS:
        most = f"it may have {_MAX_STOP_CHARACTERS:,}: shorten it."
        raise wrong("stop", f"holds a text of {longest:,} characters, and {most}")
    return tuple(words)


def _probes(fields: _Fields, served: ServedModel) -> dict[str, Any]:
    """The fields ``n_probes`` and ``dense``."""
    n_clusters = served.head.n_clusters if served.head else 2**31 - 1
    n_probes = fields.whole("n_probes", None, 1, n_clusters)
    dense = fields.take("dense", bool, served.dense and n_probes is None)
    if n_probes is not None and (dense or served.head is None):
        reason = "dense scores every token" if dense else "This model has no FlashHead"
        raise ApiError(f"{reason}: leave n_probes out.", "n_probes")
    return {"n_probes": n_probes, "dense": dense}


def _logprobs(fields: _Fields, chat: bool) -> int | None:
    if not chat:
        return fields.whole("logprobs", None, 0, MAX_LOGPROBS)
    wanted = fields.take("logprobs", bool, False)
    tops = fields.whole("top_logprobs", None, 0, MAX_LOGPROBS)
    if tops is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs to be true.")
    return (tops or 0) if wanted else None


def _reject_unsupported(fields: _Fields, chat: bool) -> None:
    fields.only("store", False, why="nothing is stored here, so leave it out.")
    fields.only("service_tier", "auto", "default", why="there is one tier, so leave it out.")
    for name in _LABELS:
        fields.take(name)
    if chat:
        fields.only("modalities", ["text"], why="answers are text, so leave it out.")
        fields.only("parallel_tool_calls", True, why="calls are not held back, so leave it out.")
    else:
        fields.only("echo", False, why="the prompt is not repeated, so leave it out.")
        fields.only("best_of", 1, why="answers are not compared, so leave it out.")
        fields.only("suffix", "", why="a text is continued to its end alone, so leave it out.")
    for name in ("adapters", "draft_model"):
        fields.only(name, why="it is chosen when the server is started.")


def _messages(messages: list[Any] | None) -> list[dict[str, Any]]:
    """The messages in the form of chat templates: each content a text, each argument an object."""
    if not messages:
        raise ApiError(_EXAMPLE, "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_settings(fields: _Fields, served: ServedModel) -> dict[str, Any]:
    field, known = "chat_template_kwargs", served.template_settings
    settings = fields.take(field, dict, {})
    for name, value in settings.items():
        sound = isinstance(value, bool | int | float) and abs(value) <= 1e9
        sound |= isinstance(value, str) and len(value) <= _MAX_SETTING
        if sound and name in known:
            continue
        most = f"a number up to 1e9 or a text of at most {_MAX_SETTING:,} characters"
        reason = f"must be true, false, {most}."
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            reason = f"is not a setting of this model's chat template, which takes: {takes}."
        raise ApiError(f"{field}.{name[:40]} {reason}", field)
    return settings


def _tools(fields: _Fields, served: ServedModel) -> list[dict[str, Any]]:
    tools, choice = fields.take("tools", list, []), fields.take("tool_choice", default="auto")
    if choice not in ("auto", "none"):
        raise wrong("tool_choice", 'must be "auto" or "none": a call cannot be forced.')
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise ApiError(f'tools[{i}] must be {{"type": "function", "function": …}}.', "tools")
        if not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise ApiError(f"tools[{i}].function must be an object with a name.", "tools")
    if tools and not served.tokenizer.has_tool_calling:
        raise ApiError("This model's chat template knows no tools: leave them out.", "tools")
    return tools if choice == "auto" else []


def _prompts(prompts: Any, served: ServedModel) -> list[str | list[int]]:
    """The texts or token ids to continue."""
    if isinstance(prompts, str) or (prompts and _are_tokens(prompts)):
        prompts = [prompts]
    sound = isinstance(prompts, list) and prompts
    if not sound or not all(isinstance(prompt, str) or _are_tokens(prompt) for prompt in prompts):
        raise wrong("prompt", "must be a text, a list of texts, or token ids.")
    last = served.vocab_size - 1
    tokens = (token for prompt in prompts if not isinstance(prompt, str) for token in prompt)
    if not all(0 <= token <= last for token in tokens):
        raise wrong("prompt", f"holds a token that this model does not have: choose 0 to {last}.")
    return prompts


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(_EXAMPLE, where)
    message = {name: value for name, value in message.items() if value is not None}
    for name in ("audio", "function_call"):  # of OpenAI's, which no template reads
        if name in message:
            raise wrong(f"{where}.{name}", "is not read here: leave it out.")
    message["content"] = _text(message.get("content", ""), f"{where}.content")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return message


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "must be a text, or a list of parts with text.")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise wrong(f"{where}[{i}]", "must be text.")
        if not isinstance(part.get("text"), str):
            raise wrong(f"{where}[{i}]", "must be a text in its field text.")
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls, with arguments as objects: templates write them as JSON themselves."""
    if not isinstance(calls, list):
        raise wrong(where, "must be a list.")
    read = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"{where}[{i}].function must be an object with a name.", where)
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str):
                arguments = loads((arguments or "{}").encode())
        except ValueError as error:
            reason = f"{where}[{i}].function.arguments must be JSON, but {error}."
            raise ApiError(reason, where) from None
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
