"""Generation with mlx-lm's own loops, which call the installed FlashHead as any other head.

By default the samplers see full logits with the tail, so every sampler of mlx-lm works unchanged.
``draw_temperature`` is the paper's sampling: the clusters are drawn by probability, and only their
tokens can be chosen.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import mlx.nn as nn
import mlx_lm

from ..head.greedy import GreedyTokens
from .compat.generate import BatchResponse, GenerationResponse
from .exact import Processor, begin, exact_processors, for_sequence
from .greedy import decodes_greedily
from .install import NO_FLASH_HEAD, get_flash_head
from .libraries import is_vlm


def stream_generate(
    model: nn.Module,
    tokenizer,
    prompt,
    *,
    n_probes: int | None = None,
    dense: bool = False,
    draw_temperature: float | None = None,
    logprobs: bool = True,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Streams text from ``model``: ``mlx_lm.stream_generate`` with settings for the FlashHead.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, or any dense one.
        tokenizer: Its tokenizer.
        prompt: Text, token ids or an array of them.
        n_probes: Clusters scored per token in this call.
        dense: Score every token in this call.
        draw_temperature: Draw the probes at this temperature; sample with the same one.
        logprobs: Whether the responses' log-probabilities are used. Without them, greedy decoding
            takes the head's token and makes no full logits (`greedy.py`).
        **kwargs: mlx_lm's keywords, such as max_tokens, sampler, logits_processors. What the
            processors leave is exact, as in :func:`exact_processors`; one with a ``begin``, such
            as :func:`grammar_processor` makes, is told that a text begins.

    Yields:
        mlx_lm's responses.

    Raises:
        ValueError: If the model has no FlashHead, or a setting is not valid.
    """
    given = {"n_probes": n_probes, "dense": dense, "draw_temperature": draw_temperature}
    settings, kwargs = _prepared(model, given, kwargs, logprobs)
    stream = mlx_lm.stream_generate(model, tokenizer, prompt, **kwargs)
    while True:
        # set for one token at a time, since streams may take turns or be abandoned
        with settings():
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
    draw_temperature: float | None = None,
    **kwargs: Any,
) -> str:
    """Generates a complete text: ``mlx_lm.generate`` with settings for the FlashHead.

    Arguments and errors are those of :func:`stream_generate`; ``verbose=True`` prints as it goes.
    """
    given = {"n_probes": n_probes, "dense": dense, "draw_temperature": draw_temperature}
    settings, kwargs = _prepared(model, given, kwargs, logprobs=False)
    with settings():
        return mlx_lm.generate(model, tokenizer, prompt, **kwargs)


def batch_generate(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    *,
    n_probes: int | None = None,
    dense: bool = False,
    draw_temperature: float | None = None,
    **kwargs: Any,
) -> BatchResponse:
    """Generates for several prompts at once: ``mlx_lm.batch_generate`` with the same settings.

    Each prompt gets its own copy of a logits processor that has ``for_sequence``, such as those of
    :func:`grammar_processor`.
    """
    given = {"n_probes": n_probes, "dense": dense, "draw_temperature": draw_temperature}
    settings = _settings(model, given)
    with settings():
        return mlx_lm.batch_generate(
            model, tokenizer, prompts, **_exact(kwargs, model, dense, several=True)
        )


def _prepared(
    model: nn.Module, given: dict[str, Any], kwargs: dict[str, Any], logprobs: bool
) -> tuple[Callable[[], AbstractContextManager], dict[str, Any]]:
    """What opens a block with these settings, and the keywords for mlx-lm."""
    settings = _settings(model, given)  # first, since it may refuse the model
    if not logprobs and decodes_greedily(model, given, kwargs):
        tokens = GreedyTokens()
        return _settings(model, given | {"greedy": tokens}), kwargs | {"sampler": tokens.sampler}
    return settings, _exact(kwargs, model, given["dense"])


def _settings(model: nn.Module, given: dict[str, Any]) -> Callable[[], AbstractContextManager]:
    """A function that opens a block in which the model's head has these settings."""
    if is_vlm(model):
        raise ValueError(
            "This is a model of mlx-vlm: generate with mlx_vlm.generate, which asks its FlashHead."
        )
    head = get_flash_head(model)
    if head is not None:
        return partial(head.settings, **given)
    if given["n_probes"] is None and given["draw_temperature"] is None:
        return nullcontext  # a dense model generates as it is
    raise ValueError(NO_FLASH_HEAD)


def _exact(
    kwargs: dict[str, Any], model: nn.Module, dense: bool, several: bool = False
) -> dict[str, Any]:
    """The keywords, with logits processors of exact outcome."""
    processors = kwargs.get("logits_processors")
    if not processors:
        return kwargs
    target = None if dense else model
    draft = kwargs.get("draft_model")
    if several:
        made: Any = _OfEachSequence(processors, lambda own: exact_processors(own, target, draft))
    else:
        begin(processors)
        made = exact_processors(processors, target, draft)
    return kwargs | {"logits_processors": made}


class _OfEachSequence:
    """A list of logits processors that gives each sequence of a batch its own.

    mlx-lm has one list for all sequences and makes a tuple of it for each of them.

    Args:
        processors: The processors. ``for_sequence`` of a processor makes a new one.
        make: Makes a sequence's list from its processors.
    """

    def __init__(
        self, processors: Sequence[Processor], make: Callable[[list[Processor]], list[Processor]]
    ):
        self._processors, self._make = processors, make

    def __iter__(self) -> Iterator[Processor]:
        return iter(self._make(for_sequence(self._processors)))
