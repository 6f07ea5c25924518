"""What mlx-lm 0.31 lacks of 0.32. It leaves with 0.31, and so do the imports of it beside it."""

import inspect
import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchResponse
from mlx_lm.generate import batch_generate as generate_batch
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download as download

Transitions = dict[str, list[tuple[str, str | None]]]
State = tuple[str | None, Transitions, str]

DEFAULT_ALLOW_PATTERNS = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


# Of a tokenizer: the number of its tokens, and a format of answers, which 0.31 knows none of.
TokenizerWrapper.__len__ = lambda self: len(self._tokenizer)
TokenizerWrapper.response_initial_state = None


def maybe_set_recommended_wired_limit() -> int | None:
    """Lets the GPU keep as much memory as is recommended. Returns the limit before, if any."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return None if recommended is None else mx.set_wired_limit(int(recommended))


def greedy_sampler(logprobs: mx.array) -> mx.array:
    """The likeliest tokens (B,) of log-probabilities (B, V)."""
    return mx.argmax(logprobs, axis=-1)


def checks_code(load: Callable[..., Any]) -> Callable[..., Any]:
    """A ``load`` that takes ``trust_remote_code``: 0.31 runs a checkpoint's own code unasked."""

    def checked(path: str, *arguments: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        revision = options.get("revision")
        folder = Path(download(str(path), revision=revision, allow_patterns=["config.json"]))
        config = folder / "config.json"
        # what cannot be read is left to mlx-lm's own errors
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if settings.get("model_file") is not None and not trust_remote_code:
            raise ValueError(
                f"The model at {folder} runs its own Python code ({settings['model_file']!r}): "
                "pass trust_remote_code=True if you trust it."
            )
        return load(path, *arguments, **options)

    return checked


def on_its_stream(steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A loop of mlx-lm that takes ``stream`` after its models: 0.31's runs on its own."""
    parameters = inspect.signature(steps).parameters.values()
    n_positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)

    def call(*arguments: Any, stream: Any = None, **options: Any) -> Iterator[Any]:
        return steps(*arguments[:n_positional], **options)

    return call


class _DecodedIds:
    """A tokenizer that keeps the ids it decodes."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.decoded: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int]) -> str:
        self.decoded.append(ids)
        return self._tokenizer.decode(ids)


def batch_generate(
    model: Any, tokenizer: Any, prompts: Any, *, return_token_ids: bool = False, **options: Any
) -> BatchResponse:
    """``mlx_lm.batch_generate`` with ``token_ids`` in its response, None unless asked for."""
    seen = _DecodedIds(tokenizer)
    response: Any = generate_batch(model, seen, prompts, **options)
    response.token_ids = seen.decoded if return_token_ids else None
    return response


def with_values(make_parser: Callable[[], ArgumentParser], **values: Any) -> Callable:
    """A maker of parsers of a program, whose arguments have values of options that 0.31 lacks."""

    def make() -> ArgumentParser:
        parser = make_parser()
        parser.set_defaults(**values)
        return parser

    return make


class TextStateMachine:
    """Follows the markers of thoughts and calls in a text, with the face of 0.32's.

    Args:
        transitions: From a state's name to its markers, each with the state after it.
    """

    def __init__(self, transitions: Transitions | None = None):
        self._transitions = transitions or {}

    def make_state(self, initial: str = "normal") -> State:
        """The state at the beginning of a text."""
        return initial, self._transitions, ""

    @staticmethod
    def split(state: State, text: str) -> tuple[State, list[tuple[str | None, str]]]:
        """Takes a chunk of text. Returns the state after it, and the text in each state passed."""
        name, transitions, held = state
        text = held + text
        segments: list[tuple[str | None, str]] = []
        while name is not None:
            markers = {marker: after for marker, after in transitions.get(name, []) if marker}
            ends = [(text.find(m) + len(m), -len(m), m) for m in markers if m in text]
            if not ends:
                break
            end, _, marker = min(ends)  # the first to end, of those the longest
            segments.append((name, text[: end - len(marker)]))
            name, text = markers[marker], text[end:]
        if name is None:
            return (name, transitions, text), [*segments, (name, "")]
        beginnings = [n for m in markers for n in range(1, len(m)) if text.endswith(m[:n])]
        certain = len(text) - max(beginnings, default=0)
        return (name, transitions, text[certain:]), [*segments, (name, text[:certain])]

    @staticmethod
    def flush(state: State) -> tuple[State, str, str | None]:
        """Gives out the text held back as a possible beginning of a marker."""
        name, transitions, held = state
        return (name, transitions, ""), held, name


def make_text_state_machine(tokenizer: Any) -> TextStateMachine:
    """The markers of a tokenizer's thoughts and calls of tools."""
    transitions: Transitions = {"normal": []}
    if tokenizer.has_thinking:
        transitions["normal"].append((tokenizer.think_start, "reasoning"))
        transitions["reasoning"] = [(tokenizer.think_end, "normal")]
    if tokenizer.has_tool_calling:
        for edges in list(transitions.values()):
            edges.append((tokenizer.tool_call_start, "tool"))
        transitions["tool"] = [(tokenizer.tool_call_end, "normal")]
    return TextStateMachine(transitions)
