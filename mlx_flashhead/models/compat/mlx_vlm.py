"""The names of mlx-vlm that may move, tested with 0.7.8 to 0.7.10.

It is an extra, so that nothing here is imported before it is needed.
"""

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def too_old() -> str | None:
    """The installed version of mlx-vlm, if a FlashHead cannot be under its models."""
    installed = version("mlx-vlm")
    parts = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    return installed if parts < (0, 7, 8) else None


def own_head(drafter: Any, target: Any) -> Any:
    """Returns what makes a drafter's logits, if it is the drafter's own.

    Returns:
        A linear layer, or an embedding's ``as_linear``; None if it is the target's, or a retrieval
        as of Gemma 4's assistant with centroids.
    """
    target = getattr(target, "language_model", target)
    drafter.bind(target)
    head = getattr(drafter, "_lm_head_fn", None) or getattr(drafter, "lm_head", None)
    if head is None:  # a tied EAGLE-3
        head = getattr(getattr(drafter, "embed_tokens", None), "as_linear", None)
    layer = getattr(head, "__self__", head)
    shared = any(layer is other for other in target.modules())
    return head if isinstance(layer, nn.Module) and not shared else None


def drafted_answer(
    target: Any, drafter: Any, kind: str, prompt: list[int], n_tokens: int
) -> Iterator[int]:
    """Tokens of the target after a prompt, sampled if possible, in the loop with the drafter."""
    from mlx_vlm.generate.ar import generate_step

    options = {"max_tokens": n_tokens, "draft_model": drafter, "draft_kind": kind}
    if not getattr(drafter, "requires_greedy_sampling", False):
        options["temperature"] = 0.8  # the states of likely tokens alone are more alike
    for token, _ in generate_step(mx.array([prompt]), target, None, None, **options):
        yield int(token)


# What makes a text of mlx-vlm's ``generate_step`` other than plain greedy decoding.
_OTHERWISE = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "sampler",
    "logits_processors", "draft_model", "kv_bits", "kv_key_bits", "kv_value_bits", "kv_key_scheme",
    "kv_value_scheme", "thinking_budget_criteria",
)  # fmt: skip


def is_greedy(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether ``generate_step`` with these keywords takes the likeliest tokens and no others."""
    from mlx_vlm.generate.common import resolve_sampling_defaults

    if any(options.get(name) is not None for name in _OTHERWISE):
        return False
    settings = {name: options.get(name) for name in ("temperature", "top_p", "top_k")}
    temperature, *_ = resolve_sampling_defaults(getattr(model, "config", None), **settings)
    return temperature == 0


def decodes_by_tokens_alone(model: nn.Module) -> bool:
    """Whether a step after the prompt reads a token and the cache, and no encoder's states."""
    names = inspect.signature(type(model.language_model).__call__).parameters
    return not {"cross_attention_states", "encoder_outputs", "decoder_input_ids"} & {*names}


def stream_and_cache(model: nn.Module, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The stream of mlx-vlm's loop, and the cache it receives or makes."""
    from mlx_vlm.generate import ar
    from mlx_vlm.models import cache

    prompt_cache = options.get("prompt_cache")
    limit = options.get("max_kv_size")
    if prompt_cache is None:
        prompt_cache = cache.make_prompt_cache(model.language_model, max_kv_size=limit)
    return ar.generation_stream, prompt_cache
