"""Checks requests: every field is served as in OpenAI's API, or refused."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...structured.grammar import Grammar
from ..catalogue import ServedModel
from .errors import Problem, wrong
from .messages import read_messages, read_template_settings
from .request_fields import MAX_NUMBER, Fields
from .response_format import read_form

# Greatest number of texts of a request: n times the number of its prompts.
MAX_CHOICES = 16
MAX_LOGPROBS = 20
_MAX_STOPS = 16
# A larger bias has the same effect, and would be infinite in float16.
_MAX_BIAS = 1e4
# OpenAI's limit. Below the other one a draw is the likeliest token, but for overflows.
_MAX_TEMPERATURE, _MIN_TEMPERATURE = 2, 1e-6
# Labels of a client's own, which ask for nothing.
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
    n_probes: int | None  # None: the head's own number
    dense: bool
    num_draft_tokens: int
    logprobs: int | None  # how many likeliest tokens each token's is told with; None: it is not
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    template_settings: dict[str, Any]
    prompts: list[str | list[int]]  # texts or token ids to continue


def find_model(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    """The served model of that name; the first without a name."""
    if name in (None, "default_model"):  # mlx-lm's word for the model of --model
        return models[0]
    for served in models:
        if name in served.names:
            return served
    names = " or ".join(name for served in models for name in served.names)
    refusal = f"No model of that name is served here: choose {names}."
    raise Problem(refusal, "model", status=404, code="model_not_found")


def read_request(
    body: dict[str, Any], *, chat: bool, models: Sequence[ServedModel], defaults: Namespace
) -> Request:
    """Checks a request's JSON: a Problem names the field. The flags are the fields' defaults."""
    fields = Fields(body)
    served = find_model(models, fields.take("model", str))
    stream = fields.take("stream", bool, False)
    request = Request(
        served,
        chat,
        stream,
        include_usage=_include_usage(fields, stream),
        n=fields.whole("n", 1, 1, MAX_CHOICES),
        max_tokens=_max_tokens(fields, defaults.max_tokens),
        sampling=_sampling(fields, served, defaults),
        penalties=_penalties(fields, served),
        form=read_form(fields),
        seed=fields.whole("seed", None, -(2**63), 2**64 - 1),
        stop=_stop(fields),
        **_probes(fields, served),
        num_draft_tokens=fields.whole("num_draft_tokens", defaults.num_draft_tokens, 1, 64),
        logprobs=_logprobs(fields, chat),
        messages=read_messages(fields.take("messages", list)) if chat else [],
        tools=_tools(fields, served) if chat else [],
        template_settings=read_template_settings(fields, served.template_settings) if chat else {},
        prompts=[] if chat else _prompts(fields, served),
    )
    _refuse_what_is_not_done(fields, chat)
    fields.end()
    if request.form is not None and request.tools:
        raise Problem("An answer of a given form calls no tools: leave tools out.", "tools")
    if (n_texts := request.n * len(request.prompts)) > MAX_CHOICES:
        most = f"at most {MAX_CHOICES} texts are made for a request"
        raise Problem(f"n times the number of prompts is {n_texts}: {most}.", "n")
    return request


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", dict)
    if options is None:
        return False
    if not stream:
        raise wrong("stream_options", "are for requests with stream.")
    options = Fields(options)
    include_usage = options.take("include_usage", bool, False)
    options.only("include_obfuscation", False, why="chunks are sent as they are, so leave it out.")
    options.end()
    return include_usage


def _max_tokens(fields: Fields, default: int) -> int:
    older = fields.whole("max_tokens", None, 1)
    newer = fields.whole("max_completion_tokens", older, 1)
    if older not in (None, newer):
        both = f"is {older} and max_completion_tokens {newer}: give one of them."
        raise wrong("max_tokens", both)
    return newer or default


def _sampling(fields: Fields, served: ServedModel, defaults: Namespace) -> dict[str, Any]:
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


def _penalties(fields: Fields, served: ServedModel) -> dict[str, Any]:
    penalties: dict[str, Any] = {}
    for kind, low in (("repetition", 0), ("presence", -MAX_NUMBER), ("frequency", -MAX_NUMBER)):
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


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", default=())
    words = [stop] if isinstance(stop, str) else stop
    sound = isinstance(words, list | tuple) and len(words) <= _MAX_STOPS
    if not sound or not all(isinstance(word, str) and word for word in words):
        most = f"must be a text or a list of at most {_MAX_STOPS} texts, none of them empty."
        raise wrong("stop", most)
    return tuple(words)


def _probes(fields: Fields, served: ServedModel) -> dict[str, Any]:
    """The fields ``n_probes`` and ``dense``."""
    head = served.head
    most = {} if head is None else {"high": head.n_clusters}
    n_probes = fields.whole("n_probes", None, 1, **most)
    dense = fields.take("dense", bool, served.dense and n_probes is None)
    if n_probes is not None and head is None:
        raise Problem("This model has no FlashHead: leave n_probes out.", "n_probes")
    if dense and n_probes is not None:
        raise Problem("dense scores every token: leave n_probes out.", "n_probes")
    return {"n_probes": n_probes, "dense": dense}


def _logprobs(fields: Fields, chat: bool) -> int | None:
    if not chat:
        return fields.whole("logprobs", None, 0, MAX_LOGPROBS)
    wanted = fields.take("logprobs", bool, False)
    tops = fields.whole("top_logprobs", None, 0, MAX_LOGPROBS)
    if tops is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs to be true.")
    return (tops or 0) if wanted else None


def _tools(fields: Fields, served: ServedModel) -> list[dict[str, Any]]:
    tools = fields.take("tools", list, [])
    choice = fields.take("tool_choice", default="auto")
    if choice not in ("auto", "none"):
        raise wrong("tool_choice", 'must be "auto" or "none": a call cannot be forced.')
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise Problem(f'tools[{i}] must be {{"type": "function", "function": …}}.', "tools")
        if not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise Problem(f"tools[{i}].function must be an object with a name.", "tools")
    if tools and not served.tokenizer.has_tool_calling:
        raise Problem("This model's chat template knows no tools: leave them out.", "tools")
    return tools if choice == "auto" else []


def _prompts(fields: Fields, served: ServedModel) -> list[str | list[int]]:
    prompts = fields.take("prompt")
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


def _refuse_what_is_not_done(fields: Fields, chat: bool) -> None:
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
