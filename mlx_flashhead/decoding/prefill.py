"""Reads a prompt into the caches, chunk by chunk as mlx-lm's loop does."""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_lm import does_model_support_input_embeddings

# Feeds tokens (1, n), and embeddings (1, n, D) if there are any, to the model: logits (1, n, V).
FeedPrompt = Callable[[mx.array, mx.array | None], mx.array]


def read_prompt(
    model: nn.Module,
    prompt: mx.array,
    feed: FeedPrompt,
    cache: list[Any],
    *,
    embeddings: mx.array | None,
    step_size: int,
    progress: Callable[[int, int], Any],
    loop: Callable[..., Iterable[Any]] | None = None,
) -> mx.array:
    """Reads a prompt, or has another loop read it.

    Args:
        model: The model.
        prompt: Tokens (n,).
        feed: Runs the model.
        cache: The caches of its layers.
        embeddings: (n, D), in the place of the tokens' own.
        step_size: Tokens that are read at once.
        progress: Called with the number of tokens read so far, and of all, as by mlx-lm.
        loop: A loop that takes mlx-lm's keywords, and knows the prompt.

    Returns:
        The dense logits (1, V) of the last position, lazy.

    Raises:
        ValueError: As from mlx-lm, if there is nothing to read, or prompt and embeddings do not fit
            together.
    """
    if loop is not None:
        return _read_by(loop, cache)
    _check(model, prompt, embeddings)
    total = len(prompt) if embeddings is None else len(embeddings)
    done = 0
    progress(done, total)
    while total - done > 1:
        end = done + min(step_size, total - done - 1)
        feed(prompt[done:end][None], None if embeddings is None else embeddings[done:end][None])
        mx.eval([layer.state for layer in cache])
        done = end
        progress(done, total)
        mx.clear_cache()
    last = None if embeddings is None else embeddings[done:][None]
    return feed(prompt[done:][None], last)[:, -1, :]


def _check(model: nn.Module, prompt: mx.array, embeddings: mx.array | None) -> None:
    if embeddings is None:
        if len(prompt) == 0:
            raise ValueError("Either input_embeddings or prompt (or both) must be provided.")
    elif not does_model_support_input_embeddings(model):
        raise ValueError("Model does not support input embeddings.")
    elif len(prompt) > 0 and len(prompt) != len(embeddings):
        raise ValueError(
            f"When providing input_embeddings, their sequence length ({len(embeddings)}) must "
            f"match the sequence length of the prompt ({len(prompt)}), or the prompt must be empty."
        )


def _read_by(loop: Callable[..., Iterable[Any]], cache: list[Any]) -> mx.array:
    """The logits (1, V) of a prompt's last position, which a loop hands to a processor."""
    taken: list[mx.array] = []

    def take(_: mx.array, logits: mx.array) -> mx.array:
        taken.append(logits)
        return logits

    def any_token(logprobs: mx.array) -> mx.array:
        return mx.zeros(logprobs.shape[:-1], mx.uint32)

    # with a limit of 0 it reads the prompt and calls these once
    for _ in loop(prompt_cache=cache, logits_processors=[take], sampler=any_token, max_tokens=0):
        pass
    return taken[-1]
