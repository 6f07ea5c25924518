"""Many texts at once, by the generator of the model's library."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .compat.generate import BatchGenerator
from .libraries import is_vlm

VLM_PREFILL = 8


def batch_generator(
    model: nn.Module,
    stop_tokens: list[list[int]],
    sampler: Callable[[mx.array], mx.array],
    batch_size: int,
) -> Any:
    """A generator with ``insert(prompts, max_tokens)``, ``next_generated()`` and ``close()``.

    Args:
        model: A model of mlx-lm or mlx-vlm.
        stop_tokens: Sequences of tokens that end a text.
        sampler: A function of log-probabilities (B, V) that returns tokens (B,).
        batch_size: Number of texts at once.
    """
    generator: Any = BatchGenerator
    together = batch_size
    if is_vlm(model):
        from .compat.vlm.generate import TextGenerator  # mlx-vlm is an extra

        # it waits for room for so many prompts before it reads any
        generator, together = TextGenerator, min(VLM_PREFILL, batch_size)
    return generator(
        model,
        stop_tokens=stop_tokens,
        sampler=sampler,
        completion_batch_size=batch_size,
        prefill_batch_size=together,
    )
