"""mlx-lm's names that may move from one version to the next. Tested with 0.31.3 to 0.32.2."""

import importlib
from dataclasses import fields as dataclass_fields
from importlib.util import find_spec
from inspect import getclosurevars, signature
from types import FunctionType
from typing import Any

from mlx_lm import sample_utils
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.generate import (
    BatchGenerator,
    BatchResponse,
    GenerationBatch,
    GenerationResponse,
    PromptProcessingBatch,
    does_model_support_input_embeddings,
    generation_stream,
    maybe_quantize_kv_cache,
    wired_limit,
)
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    LRUPromptCache,
    QuantizedKVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download as download
from mlx_lm.utils import dequantize_model, load_adapters, load_tokenizer, quantize_model, save

from .recognised import is_omlx_sampler, nested_codes

# The attribute mlx_lm.generate is the function, so the module is imported by name.
module = importlib.import_module("mlx_lm.generate")

# This module is new in 0.32.
if find_spec("mlx_lm.cli_ui") is not None:
    from mlx_lm.generate import (
        StopSequences,
        TextStateMachine,
        generate_step,
        make_text_state_machine,
        speculative_generate_step,
    )
    from mlx_lm.processors import load_processor
    from mlx_lm.utils import (
        DEFAULT_ALLOW_PATTERNS,
        load,
        maybe_set_recommended_wired_limit,
        sharded_load,
    )
else:
    from .mlx_lm_0_31 import (  # type: ignore[assignment]
        DEFAULT_ALLOW_PATTERNS,
        TextStateMachine,
        generate_step,
        load,
        load_processor,
        make_text_state_machine,
        maybe_set_recommended_wired_limit,
        sharded_load,
        speculative_generate_step,
    )
    from .mlx_lm_0_31 import StateMachineStops as StopSequences  # type: ignore[assignment]


_SAMPLERS = nested_codes(sample_utils.make_sampler)
# 0.31's top-p adds up probabilities in rising order and in the dtype of the logits, and keeps those
# at which the sum is greater than 1 - top_p.
TOP_P_SUMS_FROM_LEAST = not hasattr(sample_utils, "greedy_sampler")


def sums_from_least(sampler: Any) -> bool:
    """Whether a sampler of mlx-lm or oMLX has 0.31's top-p."""
    return TOP_P_SUMS_FROM_LEAST or is_omlx_sampler(sampler)


def mlx_lm_sampler_settings(sampler: Any) -> dict[str, Any] | None:
    """Reads from a sampler's closures what ``make_sampler`` was called with.

    Returns:
        The arguments; None for a sampler whose draw is not a threshold and the place of a number,
        as with XTC, or a least number of tokens.
    """
    if sampler is getattr(sample_utils, "greedy_sampler", sample_utils):
        return {}
    if not isinstance(sampler, FunctionType):
        return None
    if sampler.__code__ not in _SAMPLERS and not is_omlx_sampler(sampler):
        return None
    values = getclosurevars(sampler).nonlocals
    # Such a sampler of 0.31 takes the best token.
    if "sampling_methods" not in values:
        return {}
    settings: dict[str, Any] = {"temperature": float(values["temp"])}
    for method in values["sampling_methods"]:
        filtered = dict(getclosurevars(method).nonlocals)
        kept = filtered.pop("min_tokens_to_keep", 1)
        known = filtered.keys() <= {"top_p", "min_p", "top_k"}
        if not known or kept != 1:
            return None
        settings |= filtered
    is_valid = 0 <= settings.get("min_p", 0) <= 1 and settings.get("top_k", 0) >= 0
    if not is_valid or settings["temperature"] <= 0:
        return None
    return settings


# Whether processors of a text alone see its prompt: 0.31 shows them the last token of it.
PROCESSORS_SEE_PROMPT = find_spec("mlx_lm.cli_ui") is not None
# Whether a batch calls a sampler once that all of its texts were given. 0.31 calls only its own one
# for all of them.
CALLS_SHARED_SAMPLERS_ONCE = hasattr(module, "_normalize_samplers")
QUANTIZED_KV_START: int = signature(module.generate_step).parameters["quantized_kv_start"].default


def batch_response(**fields: Any) -> BatchResponse:
    """mlx-lm's ``BatchResponse``, with the fields that the installed version has."""
    names = {field.name for field in dataclass_fields(BatchResponse)}
    return BatchResponse(**{name: value for name, value in fields.items() if name in names})


def as_stop_sequences(stops: Any) -> Any:
    """A sequence's stops, whichever version's they are: 0.31 has state machines."""
    if hasattr(stops, "make_state"):
        return StopSequences(stops)
    return stops


def keys_by_layer_type(
    layers: list[Any], caches: list[Any]
) -> tuple[dict[str, tuple[Any, Any]], int]:
    """The keys and values of the last layer of each type that has a cache of its own.

    Args:
        layers: Of a model, each with a ``layer_type``. Later layers may have no caches.
        caches: Of a text alone, or of one that is alone in a batch.

    Returns:
        Keys and values (1, H, n, D) in the order of the text, by type; and the text's length.
    """
    found = {}
    n_tokens = 0
    for layer, cache in zip(layers, caches, strict=False):
        if hasattr(cache, "extract"):
            cache = cache.extract(0)
        n_tokens = cache.offset
        if hasattr(cache, "_temporal_order"):
            keys = cache._temporal_order(cache.keys)
            values = cache._temporal_order(cache.values)
        else:
            keys = cache.keys[..., :n_tokens, :]
            values = cache.values[..., :n_tokens, :]
        found[layer.layer_type] = (keys, values)
    return found, n_tokens
