"""mlx-vlm's ``generate_step`` for greedy text, verified: mlx-vlm reads the prompt and its pictures,
and the loop of one sequence goes on from there."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_vlm import decodes_by_tokens_alone, is_greedy, stream_and_cache
from .loop import verified_steps
from .proposer import Proposer

Steps = Callable[..., Iterator[Any]]


def vlm_steps(
    original: Steps,
    proposer: Proposer,
    input_ids: mx.array,
    model: nn.Module,
    pixel_values: Any,
    mask: Any,
    options: dict[str, Any],
) -> Iterator[Any] | None:
    """The verified loop in the place of ``original``; None where that one must serve: for a sampler
    or processors, a draft model, a quantized cache, or a model that decodes by more than tokens."""
    if not (proposer.verifies and input_ids.shape[0] == 1):
        return None
    if not (is_greedy(model, options) and decodes_by_tokens_alone(model)):
        return None
    options = dict(options)
    limit = options.pop("max_tokens", 256)
    stream, cache = stream_and_cache(model, options)
    prefill = partial(original, input_ids, model, pixel_values, mask)

    def text(token_ids: mx.array, cache: list[Any]) -> mx.array:
        return model.language_model(token_ids, cache=cache, logits_to_keep=1).logits

    return verified_steps(
        input_ids[0],
        text,  # type: ignore[arg-type]
        stream,
        proposer=proposer,
        max_tokens=limit,
        prefill=prefill,
        **(options | {"prompt_cache": cache}),
    )
