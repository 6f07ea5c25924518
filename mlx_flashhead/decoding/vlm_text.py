"""Greedy text of mlx-vlm's models, verified: its own loop reads the prompt and its pictures."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_vlm import decodes_by_tokens_alone, is_greedy, stream_and_cache
from .loop import verified_tokens
from .phase import Mode
from .proposer import Proposer


def vlm_tokens(
    original: Callable[..., Iterator[Any]],
    input_ids: mx.array,
    model: nn.Module,
    pixel_values: mx.array | None,
    mask: mx.array | None,
    options: dict[str, Any],
    announce: Callable[[Mode], object] | None = None,
) -> Iterator[Any] | None:
    """mlx-vlm's ``generate_step`` for greedy text, verified.

    Args:
        original: mlx-vlm's, which reads the prompt.
        input_ids: Tokens (1, n).
        model: A model of mlx-vlm.
        pixel_values: Pictures, as mlx-vlm has them.
        mask: As mlx-vlm has it.
        options: Keywords of the call.
        announce: Called for each token with how it was decoded.

    Returns:
        The loop; None where ``original`` must serve: for a sampler or processors, a draft model, a
        quantized cache, or a model that decodes by more than tokens.
    """
    proposer = Proposer(model)
    takes = proposer.verifies and len(input_ids) == 1 and is_greedy(model, options)
    if not takes or not decodes_by_tokens_alone(model):
        return None
    stream, cache = stream_and_cache(model, options)

    def text(token_ids: mx.array, cache: list[Any]) -> mx.array:
        output = cast(Any, model).language_model(token_ids, cache=cache, logits_to_keep=1)
        return cast(mx.array, output.logits)

    names = ("max_tokens", "logprobs")
    taken = {name: options[name] for name in names if name in options}
    rest = {name: value for name, value in options.items() if name not in (*names, "prompt_cache")}
    return verified_tokens(
        input_ids[0],
        text,  # type: ignore[arg-type]
        stream,
        proposer=proposer,
        prefill=partial(original, input_ids, model, pixel_values, mask, **rest),
        prompt_cache=cache,
        announce=announce,
        **taken,
    )
