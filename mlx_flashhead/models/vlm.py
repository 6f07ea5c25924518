"""The vision models of mlx-vlm: how they run on text, their tokenizer, and which write no text."""

from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat.mlx_vlm import too_old
from .errors import UnsupportedHeadError


def is_vlm(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "mlx_vlm" for cls in type(model).__mro__)


def architecture(model: nn.Module) -> str:
    return type(model).__module__.rsplit(".", 1)[-1]


def forward(model: nn.Module, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
    """The logits (B, L, V) of token ids (B, L), after a cache of mlx-lm. Nothing else changes."""
    whole: Any = model
    if is_vlm(model):
        held = [(part, dict(dict.items(part)), dict(vars(part))) for part in model.modules()]
        try:
            output = whole.language_model(tokens, **embeddings(model, tokens))
        finally:  # its modules hold what they held, such as a text's positions
            for part, arrays, attributes in held:
                dict.clear(part)
                dict.update(part, arrays)
                vars(part).clear()
                vars(part).update(attributes)
    else:
        output = whole(tokens) if cache is None else whole(tokens, cache=cache)
    logits = getattr(output, "logits", output)
    return logits[0] if isinstance(logits, tuple) else logits


def embeddings(model: nn.Module, tokens: mx.array) -> dict[str, Any]:
    """What mlx-vlm gives a language model besides token ids (B, L): embeddings and positions."""
    whole: Any = model
    inputs = vars(whole.get_input_embeddings(tokens, None))
    return {name: value for name, value in inputs.items() if value is not None}


def check_writes_text(model: nn.Module, *, runs: bool = True) -> None:
    """Raises UnsupportedHeadError for a model that does not write one token after the other. One
    that does not run may have lost its head to mlx-vlm, for embeddings."""
    if not is_vlm(model):
        return
    text, old = getattr(model, "language_model", None), too_old()
    without_head = not runs and getattr(text, "lm_head", model) is None
    if text is None or without_head or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model of mlx-vlm writes no text, so it has no output "
            "projection for a FlashHead: use it without FlashHead."
        )
    if old is not None:
        raise UnsupportedHeadError(
            f"A FlashHead takes mlx-vlm 0.7.8 or newer, and {old} is installed: update mlx-vlm."
        )
    from mlx_vlm.generate.diffusion import is_diffusion_model

    if is_diffusion_model(model):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model writes all tokens of a block at once, by "
            "diffusion, which FlashHead does not make faster: use it without FlashHead."
        )


def text_side(model: nn.Module, processor: Any) -> Any:
    """The tokenizer of a model: mlx-lm's as it is, the text side of mlx-vlm's processor."""
    return ProcessorText(model, processor) if is_vlm(model) else processor


class ProcessorText:
    """A processor's tokenizer, with the model's own chat template. ValueError if it has none."""

    def __init__(self, model: nn.Module, processor: Any):
        from mlx_vlm.utils import resolve_eos_token_ids

        self._config: Any = model.config
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(self._tokenizer, "encode"):
            name = type(processor).__name__
            raise ValueError(f"{name} has no tokenizer: give the processor of mlx_vlm.load.")
        known = getattr(self._tokenizer, "stopping_criteria", None)
        ends = getattr(known, "eos_token_ids", None) or getattr(self._config, "eos_token_id", None)
        self.eos_token_ids = resolve_eos_token_ids(ends, self._tokenizer)
        templates = (getattr(side, "chat_template", None) for side in (processor, self._tokenizer))
        self.has_chat_template = False
        if any(templates):
            with suppress(Exception):  # an architecture without one, or whatever a template raises
                hello = [{"role": "user", "content": "Hello"}]
                text = self.apply_chat_template(hello, tokenize=False)
                self.has_chat_template = isinstance(text, str)

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
        from mlx_vlm.prompt_utils import apply_chat_template
        from mlx_vlm.utils import should_add_special_tokens

        text = apply_chat_template(self._processor, self._config, messages, add_generation_prompt)
        if not tokenize:
            return text
        special = should_add_special_tokens(self._config.model_type, self._processor)
        return self._tokenizer.encode(text, add_special_tokens=special)
