"""What a caller asks of a text: its settings, mlx-lm's keywords, and what is refused.

The keywords are those of mlx-lm's ``generate``, with types, for editors that complete them. One
that does not exist is refused with a sentence that names the right one.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import mlx.core as mx
import mlx.nn as nn

from ..models.trained_drafter import TrainedDrafter
from .sampling import Processor, SamplerFunction

LOOKUPS = ("auto", "on", "off")

# What is not a keyword of ``generate``, but probably meant: what makes a sampler or processors of
# it, or the keyword's own name.
SAMPLER_ARGUMENTS = (
    "temp", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability", "xtc_threshold",
    "xtc_special_tokens",
)  # fmt: skip
PROCESSOR_ARGUMENTS = (
    "logit_bias", "repetition_penalty", "repetition_context_size", "presence_penalty",
    "presence_context_size", "frequency_penalty", "frequency_context_size",
)  # fmt: skip
OTHER_NAMES = {"temperature": "temp", "max_new_tokens": "max_tokens"}


@dataclass(frozen=True)
class DecodingSettings:
    """The settings of a call, which change a text's speed, or how close it is to the dense model's.

    Attributes:
        n_probes: Clusters scored per token; None: the FlashHead's own number.
        verify: Verify every token. Otherwise the FlashHead alone chooses, with estimates for the
            tokens that it does not score.
        dense: Score every token.
        draw_temperature: Draw the probes at this temperature, without verification; sample with
            the same one.
        max_wait: Seconds that text may wait for its verification, 0 to 1; 0 decodes densely; None:
            as long as pays.
        lookup: Whether the next tokens are looked up in the prompt and the text, and several are
            computed in a step: "auto" where that is worth its time, "on" wherever some are found,
            or "off".

    Raises:
        ValueError: If ``max_wait`` or ``lookup`` is out of its range.
    """

    n_probes: int | None = None
    verify: bool = True
    dense: bool = False
    draw_temperature: float | None = None
    max_wait: float | None = None
    lookup: str = "auto"

    def __post_init__(self) -> None:
        if self.max_wait is not None and not 0 <= self.max_wait <= 1:
            raise ValueError(f"max_wait is {self.max_wait}: it must be 0 to 1 seconds.")
        if self.lookup not in LOOKUPS:
            raise ValueError(f"lookup is {self.lookup!r}: it must be one of {', '.join(LOOKUPS)}.")

    @classmethod
    def taken_from(cls, keywords: dict[str, Any]) -> "DecodingSettings":
        """Takes the settings out of the keywords of a call."""
        named = {name: keywords.pop(name) for name in cls.__annotations__ if name in keywords}
        return cls(**named)

    @property
    def verifies(self) -> bool:
        """Whether the dense rows shall verify what the FlashHead proposes."""
        return self.verify and self.draw_temperature is None and not self.decodes_densely

    @property
    def decodes_densely(self) -> bool:
        """Whether the normal (dense) head shall choose every token."""
        return self.dense or self.max_wait == 0


class SettingsOptions(TypedDict, total=False):
    """The settings for the FlashHead: :class:`DecodingSettings` says what they mean."""

    n_probes: int | None
    verify: bool
    dense: bool
    draw_temperature: float | None
    max_wait: float | None
    lookup: str


class CacheOptions(TypedDict, total=False):
    """Keywords of mlx-lm's loops that say how a prompt is read and a cache is stored.

    Attributes:
        prefill_step_size: Tokens of the prompt that are read at a time.
        kv_bits: Bits of a quantized cache; None: it is not quantized.
        kv_group_size: Values of such a cache that share a scale.
        quantized_kv_start: The first token whose cache is quantized.
    """

    prefill_step_size: int
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int


class DecodeOptions(CacheOptions, total=False):
    """Keywords of ``mlx_lm.generate.generate_step`` and ``speculative_generate_step``.

    Attributes:
        sampler: Log-probabilities (R, V) → token ids (R,).
        logits_processors: They are applied in order.
        max_kv_size: The most tokens that the cache keeps; None: all.
        prompt_cache: Of the model's layers, then of the draft model's.
        prompt_progress_callback: Gets the number of tokens read so far, and of all.
        input_embeddings: (tokens, hidden size), of the prompt.
        num_draft_tokens: Tokens that the draft model proposes at a time, at most.
    """

    sampler: SamplerFunction | None
    logits_processors: list[Processor] | None
    max_kv_size: int | None
    prompt_cache: list[Any] | None
    prompt_progress_callback: Callable[[int, int], None] | None
    input_embeddings: mx.array | None
    num_draft_tokens: int


class StreamOptions(DecodeOptions, SettingsOptions, total=False):
    """Keywords of :func:`stream_generate`."""


class GenerateOptions(StreamOptions, total=False):
    """Keywords of ``mlx_lm.generate``, beside its positional ones.

    Attributes:
        max_tokens: The most tokens of the text; -1 is no limit.
        draft_model: A smaller model that proposes tokens, or a trained drafter.
        stream: MLX's stream that computes.
        logprobs: Whether the log-probabilities of the responses are used.
    """

    max_tokens: int
    draft_model: nn.Module | TrainedDrafter | None
    stream: mx.Stream | mx.Device
    logprobs: bool


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
    close = [usual]
    if usual not in known:
        close = difflib.get_close_matches(usual, sorted(known), n=1)
    if not close:
        return f"There is no keyword `{name}`."
    return f"There is no keyword `{name}`: did you mean `{close[0]}`?"


def check_prompt(prompt: Any) -> None:
    """Refuses the messages of a chat in the place of a prompt.

    Raises:
        TypeError: If the prompt is a list of messages; it says so in one sentence.
    """
    messages = prompt
    if isinstance(prompt, dict):
        messages = [prompt]
    if isinstance(messages, list | tuple) and messages and isinstance(messages[0], dict):
        raise TypeError(
            "The prompt is a list of messages: apply the chat template, "
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`."
        )
