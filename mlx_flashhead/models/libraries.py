"""The models of two libraries, mlx-lm and mlx-vlm: which one a model is of, how it runs, and its
tokenizer, which of mlx-vlm's processors is the text side with the face of mlx-lm's tokenizers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat import mlx_vlm

# For a model whose configuration and tokenizer do not give its context.
UNKNOWN_CONTEXT = 32768
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


class UnsupportedHeadError(ValueError):
    """A model's output projection cannot be served by FlashHead; mlx-lm can use the model."""


def is_vlm(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "mlx_vlm" for cls in type(model).__mro__)


def architecture(model: nn.Module) -> str:
    """The name of the model's architecture, for messages."""
    return type(model).__module__.rsplit(".", 1)[-1]


def forward(model: nn.Module, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
    """The logits (B, L, V) of token ids (B, L), after a cache of mlx-lm. Nothing else changes."""
    whole: Any = model
    if is_vlm(model):
        with _as_it_was(model):
            output = whole.language_model(tokens, **embeddings(model, tokens))
    else:
        output = whole(tokens) if cache is None else whole(tokens, cache=cache)
    logits = getattr(output, "logits", output)
    return logits[0] if isinstance(logits, tuple) else logits


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """After the block the modules hold what they held, such as a text's positions in mlx-vlm's."""
    held = [(module, dict(dict.items(module)), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, arrays, attributes in held:
            dict.clear(module)
            dict.update(module, arrays)
            vars(module).clear()
            vars(module).update(attributes)


def embeddings(model: nn.Module, tokens: mx.array) -> dict[str, Any]:
    """What mlx-vlm gives a language model besides token ids (B, L): embeddings and positions."""
    whole: Any = model
    inputs = vars(whole.get_input_embeddings(tokens, None))
    return {name: value for name, value in inputs.items() if value is not None}


def check_writes_text(model: nn.Module) -> None:
    """Raises UnsupportedHeadError for a model that does not write one token after the other."""
    if not is_vlm(model):
        return
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "language_model"):
        raise _without_text(model)
    old = mlx_vlm.too_old()
    if old is not None:
        raise UnsupportedHeadError(
            f"A FlashHead takes mlx-vlm 0.7.8 or newer, and {old} is installed: update mlx-vlm, or "
            "use the model without FlashHead."
        )
    if mlx_vlm.is_diffusion_model(model):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model writes all tokens of a block at once, by "
            "diffusion, which FlashHead does not make faster: use it without FlashHead."
        )


def check_has_head(model: nn.Module) -> None:
    """Raises UnsupportedHeadError if the head is taken away, as mlx-vlm does for embeddings."""
    if is_vlm(model) and getattr(getattr(model, "language_model", None), "lm_head", model) is None:
        raise _without_text(model)


def _without_text(model: nn.Module) -> UnsupportedHeadError:
    return UnsupportedHeadError(
        f"This {architecture(model)!r} model of mlx-vlm writes no text, so it has no output "
        "projection for a FlashHead: use it without FlashHead."
    )


def text_side(model: nn.Module, processor: Any) -> Any:
    """The tokenizer of a model: mlx-lm's as it is, the text side of mlx-vlm's processor."""
    return ProcessorText(model, processor) if is_vlm(model) else processor


def name_of(processor: Any) -> str:
    """The name or path that a tokenizer, or a processor's tokenizer, was loaded from."""
    name = getattr(processor, "name_or_path", "")
    return str(name or getattr(getattr(processor, "tokenizer", None), "name_or_path", "") or "")


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
        templates = (getattr(side, "chat_template", None) for side in (processor, self._tokenizer))
        hello = [{"role": "user", "content": "Hello"}]
        self.has_chat_template = any(templates) and self._chat(hello, False) is not None

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
        special = mlx_vlm.adds_special_tokens(self._config.model_type, self._processor)
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str | None:
        return mlx_vlm.chat_text(self._processor, self._config, messages, add_generation_prompt)
