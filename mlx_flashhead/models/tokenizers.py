"""The text side of mlx-vlm's processors, with the face of mlx-lm's tokenizers."""

from typing import Any

import mlx.nn as nn

from .compat import mlx_vlm
from .libraries import is_vlm

# For a model whose configuration and tokenizer do not give its context.
UNKNOWN_CONTEXT = 32768
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
PROBE = [{"role": "user", "content": "Hello"}]


def text_side(model: nn.Module, processor: Any) -> Any:
    """The tokenizer of a model: mlx-lm's as it is, the text side of mlx-vlm's processor."""
    return ProcessorText(model, processor) if is_vlm(model) else processor


def name_of(processor: Any) -> str:
    """The name or path that a tokenizer, or a processor's tokenizer, was loaded from."""
    held = (processor, getattr(processor, "tokenizer", None))
    return next((str(name) for one in held if (name := getattr(one, "name_or_path", ""))), "")


def context_of(config: dict[str, Any], tokenizer: Any) -> int:
    """The number of tokens in a model's context, from its configuration or its tokenizer."""
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 1:
                return part[key]
    length = tokenizer.model_max_length  # transformers writes 1e30 for unknown
    return length if 1 < length <= 2**24 else UNKNOWN_CONTEXT


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    """A request as a chat, or as a text where the model has no turns."""
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


class ProcessorText:
    """A processor's tokenizer, with the model's own chat template. ValueError if it has none."""

    def __init__(self, model: nn.Module, processor: Any):
        self._config: Any = model.config
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(self._tokenizer, "encode"):
            raise ValueError(
                f"{type(processor).__name__} has no tokenizer, which a FlashHead is built "
                "with: give the processor that mlx_vlm.load returns."
            )
        known = getattr(self._tokenizer, "stopping_criteria", None)
        ends = getattr(known, "eos_token_ids", None) or getattr(self._config, "eos_token_id", None)
        self.eos_token_ids = mlx_vlm.eos_token_ids(ends, self._tokenizer)
        templates = (getattr(one, "chat_template", None) for one in (processor, self._tokenizer))
        self.has_chat_template = any(templates) and self._chat(PROBE, False) is not None

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> Any:
        """Token ids of a conversation, or its text, as mlx-vlm gives them to the model."""
        text = self._chat(messages, add_generation_prompt)
        if not tokenize:
            return text
        model_type = self._config.model_type
        special = mlx_vlm.adds_special_tokens(model_type, self._processor)
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str | None:
        return mlx_vlm.chat_text(self._processor, self._config, messages, add_generation_prompt)
