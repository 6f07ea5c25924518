"""The models of two libraries, mlx-lm and mlx-vlm: which one a model is of, and how it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat.mlx_vlm import is_diffusion_model, too_old


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


def check_writes_text(model: nn.Module) -> None:
    """Raises UnsupportedHeadError for a model that does not write one token after the other."""
    if not is_vlm(model):
        return
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "language_model"):
        raise _without_text(model)
    old = too_old()
    if old is not None:
        raise UnsupportedHeadError(
            f"A FlashHead takes mlx-vlm 0.7.8 or newer, and {old} is installed: update mlx-vlm, or "
            "use the model without FlashHead."
        )
    if is_diffusion_model(model):
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


def embeddings(model: nn.Module, tokens: mx.array) -> dict[str, Any]:
    """What mlx-vlm gives a language model besides token ids (B, L): embeddings and positions."""
    whole: Any = model
    found = whole.get_input_embeddings(tokens, None)
    return {name: value for name, value in vars(found).items() if value is not None}
