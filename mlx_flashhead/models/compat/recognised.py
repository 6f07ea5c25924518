"""What is recognised of other packages: mlx-lm's names as they were imported, functions by text.

A text of this package is mlx-lm's, computed otherwise. That holds while mlx-lm's own loops would
call what they called when this package was imported: a program may replace any name of a module,
or any function of a class.
"""

import importlib
import sys
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from inspect import getsource
from types import CodeType, FunctionType
from typing import Any

# oMLX's samplers (flyto-mlx 0.7.0): those of mlx-lm 0.31, without mx.compile.
OMLX_SAMPLING = ("omlx.utils.sampling", "c76da93ba87cca11")

# The names that mlx-lm's loops look up, by module. A version may lack some.
LOOPS = {
    "mlx_lm.generate": (
        "make_prompt_cache", "maybe_quantize_kv_cache", "can_trim_prompt_cache",
        "trim_prompt_cache", "does_model_support_input_embeddings", "greedy_sampler",
        "StopSequences", "_build_trie",
    ),
    "mlx_lm.models.cache": ("KVCache", "RotatingKVCache", "QuantizedKVCache"),
    "mlx_lm.sample_utils": (
        "apply_top_k", "apply_min_p", "apply_top_p", "apply_xtc", "categorical_sampling",
        "greedy_sampler",
    ),
}  # fmt: skip
# What its batches look up besides, and the classes whose functions they are made of.
BATCHES = {
    "mlx_lm.generate": (
        "PromptProcessingBatch", "GenerationBatch", "TokenBuffer", "_merge_caches",
        "_extend_cache", "_right_pad_prompts", "_normalize_samplers",
        "_normalize_logits_processors",
    ),
}  # fmt: skip
CLASSES = ("BatchGenerator", "PromptProcessingBatch", "GenerationBatch")

# Where a name is looked up, the name, and what it stood for when it was imported.
Imported = tuple[Mapping[str, Any], str, Any]


def _imported(table: Mapping[str, tuple[str, ...]]) -> tuple[Imported, ...]:
    found: list[Imported] = []
    for module, names in table.items():
        values = vars(importlib.import_module(module))
        found += [(values, name, values[name]) for name in names if name in values]
    return tuple(found)


def _functions(classes: tuple[str, ...]) -> tuple[Imported, ...]:
    module = importlib.import_module("mlx_lm.generate")
    members = [vars(getattr(module, name)) for name in classes]
    return tuple((values, name, value) for values in members for name, value in values.items())


_LOOPS = _imported(LOOPS)
_BATCHES = _LOOPS + _imported(BATCHES) + _functions(CLASSES)


def mlx_lm_is_as_imported(*, batches: bool = False) -> bool:
    """Whether mlx-lm's loops would call what they called when this package was imported.

    A text that begins while they would not is mlx-lm's own, with the normal (dense) head.

    Args:
        batches: Ask for its batches too, and not only for its loops of one text.
    """
    entries = _BATCHES if batches else _LOOPS
    return all(values.get(name) is value for values, name, value in entries)


@cache
def digest(thing: Any) -> str:
    """Returns the digest of the text of a function or a module; "" if there is none."""
    try:
        return sha256(getsource(thing).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def nested_codes(*functions: Any) -> set[CodeType]:
    """The codes of the functions that are made within others."""
    constants = (constant for f in functions for constant in f.__code__.co_consts)
    return {constant for constant in constants if isinstance(constant, CodeType)}


def is_omlx_sampler(sampler: FunctionType) -> bool:
    """Whether oMLX has made a sampler, in the way that is known."""
    name, text = OMLX_SAMPLING
    module = sys.modules.get(name)
    if module is None or digest(module) != text:
        return False
    return sampler.__code__ in nested_codes(vars(module)["make_sampler"])
