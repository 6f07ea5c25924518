"""The names of mlx-vlm that may move, tested with 0.7.8 to 0.7.10.

It is an extra, so that nothing here is imported before it is needed.
"""

import copy
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def too_old() -> str | None:
    """The installed version of mlx-vlm, if a FlashHead cannot be under its models."""
    installed = version("mlx-vlm")
    parts = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if parts >= (0, 7, 8):
        return None
    return installed


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


# Types of drafters that want the states with which a head is called, of models that mlx-lm has.
DRAFTER_TYPES = (
    "gemma4_assistant", "gemma4_unified_assistant", "glm4_moe_lite_mtp", "glm_moe_dsa_mtp",
    "nemotron_h_mtp", "qwen3_5_mtp",
)  # fmt: skip


def available_drafters() -> list[str]:
    """Those of `DRAFTER_TYPES` of which the installed mlx-vlm has the class."""
    packages = {name: f"mlx_vlm.speculative.drafters.{name}" for name in DRAFTER_TYPES}
    return [name for name, package in packages.items() if hasattr(import_module(package), "Model")]


def load_drafter(folder: Path) -> nn.Module:
    """The drafter in a folder, evaluated."""
    from mlx_vlm.speculative import drafters

    module: Any = drafters.load_drafter(str(folder), "mtp")[0]
    return module


def drafter_splitter(config: dict[str, Any]) -> Any:
    """Returns what finds the tensors of a model's own drafter among the model's.

    It has ``output_model_type``, ``read_text_config(config)``, ``select_keys(name, text_config)``,
    ``iter_selected(folder, text_config)`` and ``prepare(folder, source_config=…)``.

    Args:
        config: The model's config.json.

    Returns:
        The splitter; None of a model whose drafters mlx-vlm does not know.
    """
    from mlx_vlm.speculative.drafters.mtp_split import get_mtp_splitter

    # Code of a checkpoint is not run.
    return get_mtp_splitter(source_config={**config, "model_file": None})


def drafter_of(config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    """A drafter with the weights that :meth:`drafter_splitter` or a file gives it, evaluated."""
    from mlx_vlm.utils import get_model_and_args, load_model_weights

    package, _ = get_model_and_args(config)
    made = package.Model(package.ModelConfig.from_dict(config))
    return load_model_weights(made, config, weights, Path())


def begun(drafter: nn.Module, target: Any, layers: list[Any]) -> Any:
    """A drafter for one text, which shares the arrays of ``drafter``.

    Args:
        drafter: The drafter.
        target: Has the parts of the target under the names that drafters look for.
        layers: The caches of the drafter's layers, from which it goes on.
    """
    own: Any = copy.copy(drafter)
    # mlx-vlm asks for a target of its own class; what must agree was compared when it was loaded
    own.validate_target_compatibility = lambda target: None
    own.reset(target)
    if layers:
        own._cache = layers
        own._next_position = length_of_pairs(layers[0])
    return own


def take_back(drafter: Any, n: int) -> None:
    """Takes the last ``n`` pairs back from a drafter of :func:`begun`, and what it drafted next."""
    for layer in drafter._cache:
        layer.trim(n)
    drafter._next_position = length_of_pairs(drafter._cache[0])
    drafter._seed_token = None
    drafter._seed_hidden = None


def length_of_pairs(layer: Any) -> int:
    """The pairs in a cache of a drafter's layer, or in the first one of several."""
    parts = getattr(layer, "caches", None)
    if parts:
        return length_of_pairs(parts[0])
    return int(layer.offset)
