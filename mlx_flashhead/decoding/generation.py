"""Generation with the choices of the dense model: mlx-lm's functions, and mlx-vlm's loop, on the
verified loops."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.compat import mlx_lm as compat
from ..models.compat.mlx_vlm import decodes_by_tokens_alone, is_greedy, stream_and_cache
from ..models.compat.patching import replaced
from ..models.install import NO_FLASH_HEAD, get_flash_head
from ..models.vlm import is_vlm
from .batch import VerifiedBatchGenerator
from .loop import drafted_steps, verified_steps
from .policy import Proposer

SETTINGS = ("n_probes", "verify", "dense", "draw_temperature", "max_wait")


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
) -> Generator[compat.GenerationResponse, None, None]:
    """Streams text from ``model``: ``mlx_lm.stream_generate`` with settings for the FlashHead.

    The text is the dense model's: the FlashHead proposes tokens, and the dense rows verify them
    before they are handed out. With samplers and processors of neither mlx-lm nor this package,
    which are called once a token, the normal (dense) head decodes.

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
        logprobs: Whether the log-probabilities of mlx_lm's responses, the dense model's, are used.
        **kwargs: mlx_lm's keywords, such as max_tokens, sampler, logits_processors. A processor
            with a ``begin``, such as :func:`grammar_processor` makes, hears that a text begins.

    Raises:
        ValueError: If the model has no FlashHead, or a setting is not valid.
    """
    settings = dict(n_probes=n_probes, verify=verify, dense=dense, max_wait=max_wait)
    proposer = _proposer(model, settings | {"draw_temperature": draw_temperature})
    stream = compat.mlx_lm_stream_generate(model, tokenizer, prompt, **kwargs)
    with _verified_loops(model, proposer, logprobs):
        response = next(stream, None)  # takes the loop
    if response is not None:
        yield response
        yield from stream


def generate(model: nn.Module, tokenizer, prompt, **kwargs: Any) -> str:
    """Generates a complete text: ``mlx_lm.generate`` with settings for the FlashHead. Arguments and
    errors are those of :func:`stream_generate`; ``verbose=True`` prints as it goes."""
    proposer = _proposer(model, kwargs)
    with _verified_loops(model, proposer, False):
        text = compat.mlx_lm_generate(model, tokenizer, prompt, **kwargs)
    if kwargs.get("verbose") and proposer.head is not None:
        print(proposer.report())
    return text


def batch_generate(
    model: nn.Module, tokenizer, prompts: list[list[int]], **kwargs: Any
) -> compat.BatchResponse:
    """Generates for several prompts at once: ``mlx_lm.batch_generate`` with the same settings. Each
    prompt gets its own copy of a processor with ``for_sequence``, as of a grammar's."""
    proposer = _proposer(model, kwargs)
    with _verified_loops(model, proposer, bool(kwargs.get("return_logprobs"))):
        return compat.batch_generate(model, tokenizer, prompts, **kwargs)


def _proposer(model: nn.Module, keywords: dict[str, Any]) -> Proposer:
    """Takes the settings of the FlashHead out of a call's ``keywords``. ValueError, before anything
    is computed, if one is not valid."""
    settings = {name: keywords.pop(name) for name in SETTINGS if name in keywords}
    if is_vlm(model):
        raise ValueError(
            "This is a model of mlx-vlm: generate with mlx_vlm.generate, which uses its FlashHead."
        )
    max_wait = settings.get("max_wait")
    if max_wait is not None and not 0 <= max_wait <= 1:
        raise ValueError(f"max_wait is {max_wait}: it must be 0 to 1 seconds.")
    head_settings = {name: settings.get(name) for name in ("n_probes", "draw_temperature")}
    head = get_flash_head(model)
    if head is not None:
        with head.settings(dense=settings.get("dense", False), **head_settings):
            pass
    elif any(value is not None for value in head_settings.values()):
        raise ValueError(NO_FLASH_HEAD)
    return Proposer(model, **settings)


def _verified_loops(
    model: nn.Module, proposer: Proposer, logprobs: bool
) -> AbstractContextManager[None]:
    """A block in which mlx-lm's functions take the verified loops, for this model alone."""
    how: dict[str, Any] = {"proposer": proposer, "logprobs": logprobs}
    loops: dict[str, Callable[..., Any]] = {
        "generate_step": partial(verified_steps, **how),
        "speculative_generate_step": partial(drafted_steps, proposer=proposer),
        "BatchGenerator": partial(VerifiedBatchGenerator, **how),
    }

    def verified(name: str) -> Callable[..., Any]:
        def take(*arguments: Any, **options: Any) -> Any:
            ours = any(argument is model for argument in arguments[:2])  # the prompt, the model
            return (loops[name] if ours else getattr(compat, name))(*arguments, **options)

        return take

    return replaced(compat.module, **{name: verified(name) for name in loops})


def verified_loop(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """A loop like mlx-lm's of that name, with the dense model's choices; None where mlx-lm's own
    serves as well."""
    if is_vlm(model):
        return None
    proposer = Proposer(model)
    if name == "speculative_generate_step":
        return partial(drafted_steps, proposer=proposer)
    return None if proposer.head is None else partial(verified_steps, proposer=proposer)


def vlm_steps(
    original: Callable[..., Iterator[Any]],
    input_ids: mx.array,
    model: nn.Module,
    pixel_values: Any,
    mask: Any,
    options: dict[str, Any],
) -> Iterator[Any] | None:
    """mlx-vlm's ``generate_step`` for greedy text, verified: ``original`` reads the prompt and its
    pictures, and the loop of one sequence goes on. None where ``original`` must serve: for a
    sampler or processors, a draft model, a quantized cache, or a model that decodes by more than
    tokens."""
    proposer = Proposer(model)
    takes = proposer.verifies and len(input_ids) == 1 and is_greedy(model, options)
    if not takes or not decodes_by_tokens_alone(model):
        return None
    stream, cache = stream_and_cache(model, options)

    def text(token_ids: mx.array, cache: list[Any]) -> mx.array:
        return model.language_model(token_ids, cache=cache, logits_to_keep=1).logits

    return verified_steps(
        input_ids[0],
        text,  # type: ignore[arg-type]
        stream,
        proposer=proposer,
        prefill=partial(original, input_ids, model, pixel_values, mask),
        **(options | {"prompt_cache": cache}),
    )
