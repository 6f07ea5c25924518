"""Reads a prompt into the caches, chunk by chunk as mlx-lm's loop does."""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_lm import does_model_support_input_embeddings

# Feeds tokens (1, n), and embeddings (1, n, D) if there are any, to the model: logits (1, n, V).
FeedPrompt = Callable[[mx.array, mx.array | None], mx.array]


def check_prompt(model: nn.Module, prompt: mx.array, embeddings: mx.array | None) -> None:
    """Checks that there is something to read, and that prompt and embeddings fit together.

    Args:
        model: The model that will read them.
        prompt: Tokens (n,).
        embeddings: Embeddings (n, D) in their place; None without any.

    Raises:
        ValueError: As from mlx-lm, if there is nothing to read or the two do not fit together.
    """
    if embeddings is None:
        if len(prompt) == 0:
            raise ValueError("Either input_embeddings or prompt (or both) must be provided.")
        return
    if not does_model_support_input_embeddings(model):
        raise ValueError("Model does not support input embeddings.")
    if len(prompt) > 0 and len(prompt) != len(embeddings):
        raise ValueError(
            f"When providing input_embeddings, their sequence length ({len(embeddings)}) must "
            f"match the sequence length of the prompt ({len(prompt)}), or the prompt must be empty."
        )


def read_prompt(
    prompt: mx.array,
    feed: FeedPrompt,
    cache: list[Any],
    *,
    embeddings: mx.array | None = None,
    step_size: int = 2048,
    progress: Callable[[int, int], Any] | None = None,
) -> mx.array:
    """Reads a prompt. Evaluates all of it but the last position.

    Args:
        prompt: Tokens (n,), none where only embeddings are given.
        feed: Runs the model.
        cache: The caches of its layers.
        embeddings: (n, D), in the place of the tokens' own.
        step_size: Tokens that are read at once.
        progress: Called with the number of tokens read so far, and of all, as by mlx-lm.

    Returns:
        The dense logits (1, V) of the last position, lazy.
    """
    total = len(prompt) if embeddings is None else len(embeddings)
    done = 0
    if progress is not None:
        progress(done, total)
    while total - done > 1:
        end = done + min(step_size, total - done - 1)
        feed(prompt[done:end][None], None if embeddings is None else embeddings[done:end][None])
        mx.eval([layer.state for layer in cache])
        done = end
        if progress is not None:
            progress(done, total)
        mx.clear_cache()
    last = None if embeddings is None else embeddings[done:][None]
    return feed(prompt[done:][None], last)[:, -1, :]


def read_by(prefill: Callable[..., Iterable[Any]], options: dict[str, Any]) -> mx.array:
    """Reads a prompt with another loop, which takes mlx-lm's keywords.

    Returns:
        The logits (1, V) of the last position, which the loop hands to a processor.
    """
    taken: list[mx.array] = []

    def take(_: mx.array, logits: mx.array) -> mx.array:
        taken.append(logits)
        return logits

    # with a limit of 0 it reads the prompt and calls these once
    for _ in prefill(**options, logits_processors=[take], sampler=_first_token, max_tokens=0):
        pass
    return taken[-1]


def _first_token(logprobs: mx.array) -> mx.array:
    """A sampler whose choice nobody reads."""
    return mx.zeros(logprobs.shape[:-1], mx.uint32)
