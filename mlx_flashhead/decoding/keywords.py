"""The keywords of mlx-lm's ``generate``, for editors that complete them.

A keyword that does not exist is refused with a sentence that names the right one.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import mlx.core as mx

# (token ids so far, logits (1, V)) → logits (1, V)
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class CacheOptions(TypedDict, total=False):
    """Keywords of mlx-lm's loops that say how a prompt is read and a cache is stored."""

    prefill_step_size: int  # tokens of the prompt that are read at a time
    kv_bits: int | None  # of a quantized cache; None: it is not quantized
    kv_group_size: int
    quantized_kv_start: int  # first token whose cache is quantized


class DecodeOptions(CacheOptions, total=False):
    """Keywords of ``mlx_lm.generate.generate_step`` and ``speculative_generate_step``."""

    sampler: Callable[[mx.array], mx.array] | None  # log-probabilities (R, V) → token ids (R,)
    logits_processors: list[LogitsProcessor] | None
    max_kv_size: int | None  # the most tokens that the cache keeps; None: all
    prompt_cache: list[Any] | None  # of the model's layers, then of the draft model's
    # gets the number of tokens read so far, and of all
    prompt_progress_callback: Callable[[int, int], None] | None
    input_embeddings: mx.array | None  # (tokens, hidden size), of the prompt
    num_draft_tokens: int  # that the draft model proposes at a time


class SettingsOptions(TypedDict, total=False):
    """The settings for the FlashHead: :class:`DecodingSettings` says what they mean."""

    n_probes: int | None
    verify: bool
    dense: bool
    draw_temperature: float | None
    max_wait: float | None
    lookup: str


class StreamOptions(DecodeOptions, SettingsOptions, total=False):
    """Keywords of :func:`stream_generate`."""


class GenerateOptions(StreamOptions, total=False):
    """Keywords of ``mlx_lm.generate``, beside its positional ones."""

    max_tokens: int  # the most tokens of the text; -1 is no limit
    draft_model: Any  # a smaller model that proposes tokens
    stream: Any  # MLX's stream that computes
    logprobs: bool  # whether the log-probabilities of the responses are used


SAMPLER_ARGUMENTS = (
    "temp", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability", "xtc_threshold",
    "xtc_special_tokens",
)  # fmt: skip
PROCESSOR_ARGUMENTS = (
    "logit_bias", "repetition_penalty", "repetition_context_size", "presence_penalty",
    "presence_context_size", "frequency_penalty", "frequency_context_size",
)  # fmt: skip
OTHER_NAMES = {"temperature": "temp", "max_new_tokens": "max_tokens"}


def check_keywords(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuses keywords that do not exist, and names what was probably meant.

    Args:
        given: The keywords of a call, with their values.
        known: Names of all keywords of the function.

    Raises:
        TypeError: In one sentence, for the first keyword that is not known.
    """
    names = set(known)
    for name, value in given.items():
        if name not in names:
            raise TypeError(_refusal(name, value, names))


def _refusal(name: str, value: Any, known: set[str]) -> str:
    usual = OTHER_NAMES.get(name, name)
    shown = f"{usual}={value!r:.60}"
    if usual in SAMPLER_ARGUMENTS:
        return f"There is no keyword `{name}`: give `sampler=make_sampler({shown})`."
    if usual in PROCESSOR_ARGUMENTS:
        call = f"logits_processors=mlx_lm.sample_utils.make_logits_processors({shown})"
        return f"There is no keyword `{name}`: give `{call}`."
    close = [usual] if usual in known else difflib.get_close_matches(usual, sorted(known), n=1)
    meant = f": did you mean `{close[0]}`?" if close else "."
    return f"There is no keyword `{name}`{meant}"


def check_prompt(prompt: Any) -> None:
    """Refuses the messages of a chat in the place of a prompt.

    Raises:
        TypeError: If the prompt is a list of messages; it says so in one sentence.
    """
    messages = [prompt] if isinstance(prompt, dict) else prompt
    if isinstance(messages, list | tuple) and messages and isinstance(messages[0], dict):
        raise TypeError(
            "The prompt is a list of messages: apply the chat template, "
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`."
        )
