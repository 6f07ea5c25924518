"""Generation with the choices of the dense model: mlx-lm's functions on the verified loops."""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import mlx.nn as nn

from ..models.compat.mlx_lm import (
    BatchGenerator,
    BatchResponse,
    GenerationResponse,
    generate_step,
    loops,
    mlx_lm_generate,
    mlx_lm_stream_generate,
    speculative_generate_step,
)
from ..models.compat.mlx_lm import batch_generate as mlx_lm_batch_generate
from ..models.install import NO_FLASH_HEAD, get_flash_head
from ..models.libraries import is_vlm
from .batch import VerifiedBatchGenerator
from .loop import drafted_steps, verified_steps
from .proposer import Proposer


def stream_generate(
    model: nn.Module,
    tokenizer,
    prompt,
    *,
    n_probes: int | None = None,
    verify: bool = True,
    dense: bool = False,
    draw_temperature: float | None = None,
    max_wait: float | None = None,
    logprobs: bool = True,
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Streams text from ``model``: ``mlx_lm.stream_generate`` with settings for the FlashHead.

    The text is the dense model's: the FlashHead proposes tokens, and the dense rows verify them
    before they are handed out. Samplers and processors that cannot be verified, those of neither
    mlx-lm nor this package, are called once a token, and the text is decoded by the normal (dense)
    head.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, or any dense one.
        tokenizer: Its tokenizer.
        prompt: Text, token ids or an array of them.
        n_probes: Clusters scored per token in this call.
        verify: Verify every token. Without, the FlashHead alone chooses, with estimates for tokens
            that it does not score.
        dense: Score every token in this call.
        draw_temperature: Draw the probes at this temperature, without verification; sample with
            the same one.
        max_wait: Seconds that text may wait for its verification, 0 to 1; 0 decodes densely.
        logprobs: Whether the responses' log-probabilities are used. They are the dense model's.
        **kwargs: mlx_lm's keywords, such as max_tokens, sampler, logits_processors. A processor
            with a ``begin``, such as :func:`grammar_processor` makes, is told that a text begins.

    Yields:
        mlx_lm's responses.

    Raises:
        ValueError: If the model has no FlashHead, or a setting is not valid.
    """
    proposer = _proposer(model, n_probes, verify, dense, draw_temperature, max_wait)
    stream = mlx_lm_stream_generate(model, tokenizer, prompt, **kwargs)
    with loops(**_loops(model, proposer, logprobs)):
        response = next(stream, None)  # takes the loop
    while response is not None:
        yield response
        response = next(stream, None)


def generate(
    model: nn.Module,
    tokenizer,
    prompt,
    *,
    n_probes: int | None = None,
    verify: bool = True,
    dense: bool = False,
    draw_temperature: float | None = None,
    max_wait: float | None = None,
    **kwargs: Any,
) -> str:
    """Generates a complete text: ``mlx_lm.generate`` with settings for the FlashHead. Arguments and
    errors are those of :func:`stream_generate`; ``verbose=True`` prints as it goes."""
    proposer = _proposer(model, n_probes, verify, dense, draw_temperature, max_wait)
    with loops(**_loops(model, proposer, False)):
        text = mlx_lm_generate(model, tokenizer, prompt, **kwargs)
    if kwargs.get("verbose") and proposer.head is not None:
        print(proposer.report())
    return text


def batch_generate(
    model: nn.Module,
    tokenizer,
    prompts: list[list[int]],
    *,
    n_probes: int | None = None,
    verify: bool = True,
    dense: bool = False,
    draw_temperature: float | None = None,
    max_wait: float | None = None,
    **kwargs: Any,
) -> BatchResponse:
    """Generates for several prompts at once: ``mlx_lm.batch_generate`` with the same settings. Each
    prompt gets its own copy of a processor with ``for_sequence``, as of
    :func:`grammar_processor`."""
    proposer = _proposer(model, n_probes, verify, dense, draw_temperature, max_wait)
    logprobs = bool(kwargs.get("return_logprobs"))

    def generator(other: nn.Module, *arguments: Any, **options: Any) -> Any:
        if other is not model:
            return BatchGenerator(other, *arguments, **options)
        return VerifiedBatchGenerator(other, proposer=proposer, logprobs=logprobs, **options)

    with loops(BatchGenerator=generator):
        return mlx_lm_batch_generate(model, tokenizer, prompts, **kwargs)


def verified_loop(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """A loop like mlx-lm's of that name, with the dense model's choices; None where mlx-lm's own
    serves as well."""
    if is_vlm(model):
        return None
    proposer = Proposer(model)
    if name == "speculative_generate_step":
        return partial(drafted_steps, proposer=proposer)
    return None if proposer.head is None else partial(verified_steps, proposer=proposer)


def _proposer(
    model: nn.Module,
    n_probes: int | None,
    verify: bool,
    dense: bool,
    draw_temperature: float | None,
    max_wait: float | None,
) -> Proposer:
    if is_vlm(model):
        raise ValueError(
            "This is a model of mlx-vlm: generate with mlx_vlm.generate, which uses its FlashHead."
        )
    if max_wait is not None and not 0 <= max_wait <= 1:
        raise ValueError(f"max_wait is {max_wait}: it must be 0 to 1 seconds.")
    head = get_flash_head(model)
    if head is None:
        if n_probes is not None or draw_temperature is not None:
            raise ValueError(NO_FLASH_HEAD)
    else:
        with head.settings(dense=dense, n_probes=n_probes, draw_temperature=draw_temperature):
            pass  # refuses what is not valid, before anything is computed
    return Proposer(
        model,
        verify=verify,
        dense=dense,
        n_probes=n_probes,
        draw_temperature=draw_temperature,
        max_wait=max_wait,
    )


def _loops(model: nn.Module, proposer: Proposer, logprobs: bool) -> dict[str, Callable[..., Any]]:
    """The loops for mlx-lm's functions, for this model alone."""

    def one_text(prompt: Any, other: Any, *arguments: Any, **options: Any) -> Any:
        if other is not model:
            return generate_step(prompt, other, *arguments, **options)
        options |= {"proposer": proposer, "logprobs": logprobs}
        return verified_steps(prompt, other, *arguments, **options)

    def drafted_text(prompt: Any, other: Any, *arguments: Any, **options: Any) -> Any:
        if other is not model:
            return speculative_generate_step(prompt, other, *arguments, **options)
        return drafted_steps(prompt, other, *arguments, proposer=proposer, **options)

    return {"generate_step": one_text, "speculative_generate_step": drafted_text}
