"""The vision models of mlx-vlm: how they run on text, their tokenizer, and which write no text."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat.mlx_vlm import too_old
from .errors import UnsupportedHeadError


def is_vlm(model: nn.Module) -> bool:
    """Whether a model is mlx-vlm's."""
    return any(cls.__module__.split(".")[0] == "mlx_vlm" for cls in type(model).__mro__)


def architecture(model: nn.Module) -> str:
    """The name of a model's architecture, as mlx-lm or mlx-vlm names its module."""
    return type(model).__module__.rsplit(".", 1)[-1]


def forward(model: nn.Module, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
    """Runs a model on text. Nothing changes but the cache.

    Args:
        model: A model of mlx-lm or mlx-vlm.
        tokens: Token ids (B, L).
        cache: A prompt cache of mlx-lm, for its models alone.

    Returns:
        The logits (B, L, V).
    """
    whole: Any = model
    if is_vlm(model):
        with _unchanged(model):
            output = whole.language_model(tokens, **embeddings(model, tokens))
    elif cache is None:
        output = whole(tokens)
    else:
        output = whole(tokens, cache=cache)
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple):
        return logits[0]
    return logits


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """After the block, a model's modules hold what they held, such as a text's positions."""
    held = []
    for part in model.modules():
        held.append((part, dict(dict.items(part)), dict(vars(part))))
    try:
        yield
    finally:
        for part, arrays, attributes in held:
            dict.clear(part)
            dict.update(part, arrays)
            vars(part).clear()
            vars(part).update(attributes)


def embeddings(model: nn.Module, tokens: mx.array) -> dict[str, Any]:
    """The embeddings and positions that mlx-vlm gives a language model besides token ids.

    Args:
        model: A model of mlx-vlm.
        tokens: Token ids (B, L).

    Returns:
        Arguments of its language model, by name.
    """
    whole: Any = model
    inputs = vars(whole.get_input_embeddings(tokens, None))
    return {name: value for name, value in inputs.items() if value is not None}


def check_writes_text(model: nn.Module, *, runs: bool = True) -> None:
    """Refuses a model that does not write one token after the other.

    Args:
        model: A model of mlx-lm or mlx-vlm.
        runs: Whether it runs on text. One that does not may have lost its head, since mlx-vlm takes
            it for a model of embeddings.

    Raises:
        UnsupportedHeadError: If it writes no text, or all tokens of a block at once.
    """
    if not is_vlm(model):
        return
    text = getattr(model, "language_model", None)
    without_head = not runs and getattr(text, "lm_head", model) is None
    if text is None or without_head or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model of mlx-vlm writes no text, so it has no output "
            "projection for a FlashHead: use it without FlashHead."
        )
    old = too_old()
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
    if is_vlm(model):
        return ProcessorText(model, processor)
    return processor


class ProcessorText:
    """A processor's tokenizer, with the model's own chat template.

    Args:
        model: A model of mlx-vlm.
        processor: Its processor.

    Raises:
        ValueError: If the processor has no tokenizer.
    """

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
        self.has_chat_template = self._fills_template()

    def _fills_template(self) -> bool:
        """Whether there is a chat template that mlx-vlm can fill in."""
        sides = (self._processor, self._tokenizer)
        if not any(getattr(side, "chat_template", None) for side in sides):
            return False
        # An architecture may have none, and a template raises any type.
        with suppress(Exception):
            hello = [{"role": "user", "content": "Hello"}]
            return isinstance(self.apply_chat_template(hello, tokenize=False), str)
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> Any:
        """A conversation as mlx-vlm gives it to the model.

        Args:
            messages: Messages with ``role`` and ``content``.
            add_generation_prompt: Begin the model's turn.
            tokenize: Return token ids, not the text.
        """
        from mlx_vlm.prompt_utils import apply_chat_template
        from mlx_vlm.utils import should_add_special_tokens

        text = apply_chat_template(self._processor, self._config, messages, add_generation_prompt)
        if not tokenize:
            return text
        special = should_add_special_tokens(self._config.model_type, self._processor)
        return self._tokenizer.encode(text, add_special_tokens=special)
