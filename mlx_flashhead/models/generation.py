"""Generation: mlx-lm's own loops, which use the installed FlashHead as they use any head.

Two ways to sample over the full vocabulary are offered. By default the samplers see full logits
with the tail, so every sampler of mlx-lm works unchanged. ``draw_probes`` is the paper's way: the
clusters are drawn by probability and only their tokens can be chosen.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.nn as nn
import mlx_lm

from .compat import BatchResponse, GenerationResponse
from .install import get_flash_head


@contextmanager
def head_settings(
    model: nn.Module,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    draw_probes: float | None = None,
) -> Iterator[None]:
    """Within the block, the model's FlashHead runs with other settings.

    Args:
        model: A model with a FlashHead.
        n_probes: Clusters scored per token.
        dense: Score every token.
        draw_probes: Draw the probes by probability at this temperature, as in the paper.

    Raises:
        ValueError: If the model has no FlashHead, or a setting is not valid.
    """
    head = get_flash_head(model)
    if head is None:
        if n_probes is None and draw_probes is None:
            yield  # a dense model generates as it is
            return
        raise ValueError("This model has no FlashHead: load it with mlx_flashhead.load.")
    before = head.n_probes
    with ExitStack() as stack:
        if n_probes is not None:
            head.n_probes = n_probes
            stack.callback(setattr, head, "n_probes", before)
        if dense:
            stack.enter_context(head.dense())
        if draw_probes is not None:
            stack.enter_context(head.drawn_probes(draw_probes))
        yield


def stream_generate(
    model: nn.Module,
    tokenizer,
    prompt,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    draw_probes: float | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Streams text from ``model``: ``mlx_lm.stream_generate`` with settings for the FlashHead.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, or any dense one.
        tokenizer: Its tokenizer.
        prompt: Text, token ids or an array of them.
        n_probes: Clusters scored per token in this call.
        dense: Score every token in this call.
        draw_probes: Draw the probes at this temperature; sample with the same one.
        **kwargs: mlx_lm's keywords, such as max_tokens, sampler, logits_processors.

    Yields:
        mlx_lm's responses.

    Raises:
        ValueError: As in :func:`head_settings`.
    """
    stream = mlx_lm.stream_generate(model, tokenizer, prompt, **kwargs)
    while True:
        # only while a token is made: streams may take turns, and may be abandoned
        with head_settings(model, n_probes=n_probes, dense=dense, draw_probes=draw_probes):
            response = next(stream, None)
        if response is None:
            return
        yield response


def generate(
    model: nn.Module,
    tokenizer,
    prompt,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    draw_probes: float | None = None,
    **kwargs: Any,
) -> str:
    """Generates a complete text: ``mlx_lm.generate`` with settings for the FlashHead.

    Arguments and errors are those of :func:`stream_generate`; ``verbose=True`` prints as it goes.
    """
    with head_settings(model, n_probes=n_probes, dense=dense, draw_probes=draw_probes):
        return mlx_lm.generate(model, tokenizer, prompt, **kwargs)


def batch_generate(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    *,
    n_probes: int | None = None,
    dense: bool = False,
    draw_probes: float | None = None,
    **kwargs: Any,
) -> BatchResponse:
    """Generates for several prompts at once: ``mlx_lm.batch_generate``, likewise extended."""
    with head_settings(model, n_probes=n_probes, dense=dense, draw_probes=draw_probes):
        return mlx_lm.batch_generate(model, tokenizer, prompts, **kwargs)
