"""Checks requests: a field has OpenAI's meaning, or changes nothing, or is an error."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence, Set
from typing import Any

from ..models.compat.mlx_lm import TextStateMachine
from ..structured.grammar import Grammar
from .api_errors import ApiError, field_error
from .fields import (
    CHAT_FIELDS,
    MAX_CHOICES,
    PENALTIES,
    SCHEMA_FIELDS,
    STREAM_OPTIONS,
    TEMPLATE_FIELDS,
    TEXT_FIELDS,
    Number,
    Of,
    read_all_fields,
    read_fields,
)
from .messages import read_messages
from .served_models import ServedModel
from .tool_calls import read_tools

# Characters of a schema, an expression or a grammar; OpenAI's limit for a schema is of this size.
MAX_CHARACTERS = 100_000
_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 1000
_MAX_BIAS = 1e4  # a larger one has the same effect, and would be infinite in float16
_MIN_TEMPERATURE = 1e-6  # below it a draw is the likeliest token, but for overflows


class Request:
    """A checked request.

    Args:
        body: The JSON object of the client.
        chat: Whether it is a chat. Otherwise it continues texts.
        models: The models that are served, the default first.
        flags: The server's flags, which have the defaults.

    Raises:
        ApiError: If a field cannot be followed. The error names the field.
    """

    def __init__(
        self, body: dict[str, Any], *, chat: bool, models: Sequence[ServedModel], flags: Namespace
    ):
        self.chat = chat
        served = find_model(models, body.get("model"))
        self.served = served
        n_clusters = served.head.n_clusters if served.head else 2**31 - 1
        rules = {**(CHAT_FIELDS if chat else TEXT_FIELDS), "n_probes": Number(int, 1, n_clusters)}
        fields, self.ignored = read_fields(body, rules)  # the names of fields without effect
        self._read_stream(fields)
        self._read_texts(fields)
        # tokens of an answer; None: as many as fit into the context
        self.max_tokens: int | None = _max_tokens(fields, flags.max_tokens)
        self.grammar = _grammar(fields)  # that an answer follows; None for any text
        self.tools = read_tools(fields, served)
        self.template_settings = self._template_settings(fields)
        # whether control tokens in the texts of users and tools are read as text
        self.escape_control_tokens: bool = flags.escape_control_tokens
        self._read_probes(fields)
        self.num_draft_tokens: int = fields.get("num_draft_tokens", flags.num_draft_tokens)
        # the number of likeliest tokens beside each chosen one; None: no logprobs
        self.logprobs: int | None = _n_logprobs(fields) if chat else fields.get("logprobs")
        self.seed: int | None = fields.get("seed")
        self.sampling = _sampling(fields, served, flags)  # arguments of make_sampler
        self.penalties = _penalties(fields, served)  # arguments of mlx-lm's make_logits_processors

    def _read_stream(self, fields: dict[str, Any]) -> None:
        """Whether and how the answer is streamed."""
        self.stream: bool = fields.get("stream", False)
        self.include_usage = False  # at the end of a stream
        if self.stream:
            options, further = read_fields(fields.get("stream_options", {}), STREAM_OPTIONS)
            self.include_usage = options.get("include_usage", False)
            self.ignored += [f"stream_options.{name}" for name in further]
        elif "stream_options" in fields:
            self.ignored.append("stream_options")

    def _read_texts(self, fields: dict[str, Any]) -> None:
        """What is answered or continued, how often, and where an answer ends."""
        served = self.served
        self.messages: list[dict[str, Any]] = []
        self.prompts: list[str | list[int]] = []  # texts or token ids to continue
        stops = list(_stop_texts(fields.get("stop", [])))  # texts before which an answer ends
        if self.chat:
            takes_developer = served.takes_developer
            self.messages = read_messages(fields.get("messages"), takes_developer=takes_developer)
        else:
            self.prompts = _prompts(fields.get("prompt"), served)
            if suffix := fields.get("suffix"):
                self.prompts = _around_gaps(self.prompts, suffix, served)
                stops += served.middle_ends
        self.n: int = fields.get("n", 1)  # answers to each prompt
        n_texts = self.n * len(self.prompts)
        if n_texts > MAX_CHOICES:
            most = f"at most {MAX_CHOICES} texts are made for a request"
            raise ApiError(f"n times the number of prompts is {n_texts}: {most}.", "n")
        self.stop = TextStateMachine(
            {"normal": [(text, None) for text in stops]} if stops else None
        )

    def _read_probes(self, fields: dict[str, Any]) -> None:
        """Which head answers, and with how many clusters."""
        served = self.served
        self.n_probes: int | None = fields.get("n_probes")  # None: the head's number
        self.dense: bool = fields.get("dense", served.dense and self.n_probes is None)
        if self.n_probes is not None and (self.dense or served.head is None):
            reason = "dense scores every token" if self.dense else "This model has no FlashHead"
            raise ApiError(f"{reason}: leave n_probes out.", "n_probes")

    def _template_settings(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The variables that a request gives to the chat template."""
        known = self.served.template_settings
        settings = {}
        for name in TEMPLATE_FIELDS:
            if name in fields and name in known:
                settings[name] = fields[name]
            elif name in fields:
                self.ignored.append(name)
        return settings | _template_arguments(fields.get("chat_template_kwargs", {}), known)


def find_model(models: Sequence[ServedModel], name: Any) -> ServedModel:
    """Returns the served model of that name; the first without a name.

    Raises:
        ApiError: If no served model has the name.
    """
    if name in (None, "default_model"):  # mlx-lm's word for the model of --model
        return models[0]
    by_name = {known: served for served in models for known in served.names}
    if not isinstance(name, str) or name not in by_name:
        raise unknown_model(list(by_name))
    return by_name[name]


def unknown_model(names: Sequence[str]) -> ApiError:
    """The error of a model that is not among the served ones."""
    refusal = f"No model of that name is served here: choose {' or '.join(names)}."
    return ApiError(refusal, "model", status=404, code="model_not_found")


def _max_tokens(fields: dict[str, Any], default: int | None) -> int | None:
    """The request's limit of an answer, else the server's."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    limits = {fields[name] for name in names}
    if len(limits) > 1:
        differ = "max_completion_tokens and max_tokens are two names of one limit, and they differ"
        raise ApiError(f"{differ}: send one of them.", "max_tokens")
    return limits.pop() if limits else default


def _n_logprobs(fields: dict[str, Any]) -> int | None:
    """The number of likeliest tokens that a chat wants to see; None without logprobs."""
    if fields.get("logprobs"):
        return fields.get("top_logprobs", 0)
    if fields.get("top_logprobs"):
        raise field_error("top_logprobs", "needs logprobs to be true.")
    return None


def _sampling(fields: dict[str, Any], served: ServedModel, flags: Namespace) -> dict[str, Any]:
    """The arguments of ``make_sampler``, without the seed."""
    temperature = fields.get("temperature", flags.temp)
    top_p = fields.get("top_p", flags.top_p)
    top_k = fields.get("top_k", flags.top_k)
    takes_likeliest = top_p == 0 or temperature < _MIN_TEMPERATURE
    tokenizer = served.tokenizer
    return {
        "temp": 0.0 if takes_likeliest else temperature,
        "top_p": top_p,
        "top_k": 0 if top_k >= served.vocab_size else top_k,  # 0: all tokens
        "min_p": fields.get("min_p", flags.min_p),
        "xtc_probability": fields.get("xtc_probability", 0.0),
        "xtc_threshold": fields.get("xtc_threshold", 0.1),
        "xtc_special_tokens": [*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    }


def _penalties(fields: dict[str, Any], served: ServedModel) -> dict[str, Any]:
    """The arguments of mlx-lm's ``make_logits_processors``."""
    penalties: dict[str, Any] = {"logit_bias": _logit_bias(fields.get("logit_bias", {}), served)}
    for kind in PENALTIES:
        for name, default in ((f"{kind}_penalty", 0.0), (f"{kind}_context_size", 20)):
            penalties[name] = fields.get(name, default)
    return penalties


def _logit_bias(biases: dict[str, Any], served: ServedModel) -> dict[int, float] | None:
    bias = {}
    for key, value in biases.items():
        is_number = key.isascii() and key.isdigit() and len(key) < 10
        token = int(key) if is_number else -1
        if not 0 <= token < served.vocab_size or type(value) not in (int, float):
            remedy = f"choose 0 to {served.vocab_size - 1}"
            raise field_error("logit_bias", f"must give each token id a number: {remedy}.")
        bias[token] = float(max(-_MAX_BIAS, min(_MAX_BIAS, value)))
    return bias or None


def _stop_texts(stop: Any) -> list[str]:
    texts = [stop] if isinstance(stop, str) else stop
    is_valid = isinstance(texts, list) and len(texts) <= _MAX_STOPS
    if not is_valid or not all(
        isinstance(text, str) and 0 < len(text) <= _MAX_STOP_CHARACTERS for text in texts
    ):
        most = f"at most {_MAX_STOPS} texts, each of 1 to {_MAX_STOP_CHARACTERS:,} characters"
        raise field_error("stop", f"must be a text or a list of {most}.")
    return texts


def _grammar(fields: dict[str, Any]) -> Grammar | None:
    """What ``response_format``, ``regex`` or ``grammar`` asks for; an ApiError for two of them."""
    makers: dict[str, Callable[[Any], Grammar]] = {
        "regex": Grammar.from_regex,
        "grammar": Grammar.from_lark,
    }
    # of each: its place in the request, what makes a grammar, and from what
    wanted = [(name, make, fields[name]) for name, make in makers.items() if name in fields]
    if "response_format" in fields:
        wanted += _response_format(fields["response_format"], makers)
    if len(wanted) > 1:
        only_one = "An answer has one form: give response_format, regex or grammar."
        raise ApiError(only_one, "response_format")
    for where, make, source in wanted:
        field = where.partition(".")[0]
        if len(json.dumps(source)) > MAX_CHARACTERS:
            raise field_error(field, f"is longer than {MAX_CHARACTERS:,} characters: simplify it.")
        try:
            return make(source)
        except ValueError as error:
            raise ApiError(f"{where}: {error}", field) from None
    return None


def _response_format(
    value: Any, makers: dict[str, Callable[[Any], Grammar]]
) -> list[tuple[str, Callable[[Any], Grammar], Any]]:
    """The grammar that a ``response_format`` asks for, as in `_grammar`; none for any text."""
    field = "response_format"
    kinds = ("text", "json_object", "json_schema", *makers)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in kinds:
        raise field_error(field, f"must be an object with a type: {', '.join(kinds)}.")
    described = read_all_fields(value, {"type": Of(str), kind: Of(object)}).get(kind)
    where = f"{field}.{kind}"
    if kind == "text":
        return []
    if kind == "json_object":
        return [(where, Grammar.from_json_schema, {"type": "object"})]
    if kind == "json_schema":
        if not isinstance(described, dict) or not described.get("name"):
            raise ApiError(f'{where} must be an object with a "name" and a "schema".', field)
        schema = read_all_fields(described, SCHEMA_FIELDS).get("schema", {"type": "object"})
        return [(f"{where}.schema", Grammar.from_json_schema, schema)]
    return [(where, makers[kind], described)]


def _template_arguments(arguments: dict[str, Any], known: Set[str]) -> dict[str, Any]:
    field = "chat_template_kwargs"
    for name, value in arguments.items():
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            reason = f"is not a setting of this model's chat template, which takes: {takes}."
            raise ApiError(f"{field}.{name[:40]} {reason}", field)
        if not isinstance(value, bool | int | float | str):
            plain = "must be true, false, a number or a text."
            raise ApiError(f"{field}.{name[:40]} {plain}", field)
    return arguments


def _prompts(prompts: Any, served: ServedModel) -> list[str | list[int]]:
    """The texts or token ids to continue."""
    last = served.vocab_size - 1

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(type(i) is int and 0 <= i <= last for i in value)

    if isinstance(prompts, str) or (prompts and are_tokens(prompts)):
        prompts = [prompts]
    is_list = isinstance(prompts, list) and prompts
    if not is_list or not all(isinstance(prompt, str) or are_tokens(prompt) for prompt in prompts):
        which = f"token ids: choose 0 to {last}"
        raise field_error("prompt", f"must be a text, a list of texts, or {which}.")
    return prompts


def _around_gaps(
    prompts: list[str | list[int]], suffix: str, served: ServedModel
) -> list[str | list[int]]:
    """The prompts whose continuation stands between each of ``prompts`` and the suffix."""
    if served.middle is None:
        reason = "needs a model with fill-in-the-middle tokens, and this one has none"
        raise field_error("suffix", f"{reason}: leave it out.")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts):
        raise field_error("suffix", "needs prompts that are texts, not token ids.")
    return [served.middle.prompt(text, suffix) for text in texts]
