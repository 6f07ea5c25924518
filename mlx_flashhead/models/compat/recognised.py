"""What is recognised of other packages: mlx-lm's names as they were imported, functions by text.

A text of this package is mlx-lm's, computed otherwise. That holds while mlx-lm's own loops would
call what they called when this package was imported: a program may replace any name of a module,
or any function of a class. A cache is a library's own class, with the functions that it was
imported with, or unknown: a subclass may say that it can be trimmed because its parent can.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from inspect import getsource
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

# oMLX's samplers (flyto-mlx 0.7.0): those of mlx-lm 0.31, without mx.compile.
OMLX_SAMPLING = ("omlx.utils.sampling", "c76da93ba87cca11")

# The names that mlx-lm's loops look up, by module. A version may lack some.
LOOPS = {
    "mlx_lm.generate": (
        "make_prompt_cache", "maybe_quantize_kv_cache", "can_trim_prompt_cache",
        "trim_prompt_cache", "does_model_support_input_embeddings", "greedy_sampler",
        "StopSequences", "_build_trie",
    ),
    "mlx_lm.models.cache": (
        "KVCache", "RotatingKVCache", "QuantizedKVCache",
        # which 0.31 looks up here
        "make_prompt_cache", "can_trim_prompt_cache", "trim_prompt_cache",
    ),
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


def _as_imported(names_of: Mapping[Any, Iterable[str]]) -> dict[tuple[Any, str], Any]:
    """What names stand for now, by the module or the class in which they are looked up."""
    found = {}
    for owner, names in names_of.items():
        for name in names:
            if name in vars(owner):
                found[owner, name] = vars(owner)[name]
    return found


def _modules(table: Mapping[str, Iterable[str]]) -> dict[Any, Iterable[str]]:
    return {importlib.import_module(module): names for module, names in table.items()}


_generate = importlib.import_module("mlx_lm.generate")
_LOOPS = _as_imported(_modules(LOOPS))
_BATCHES = _LOOPS | _as_imported(_modules(BATCHES))
_classes = [getattr(_generate, name) for name in CLASSES]
_BATCHES |= _as_imported({cls: vars(cls) for cls in _classes})


def mlx_lm_is_as_imported() -> bool:
    """Whether mlx-lm's loops of a text would call what they called when this package was imported.

    A text that begins while they would not is mlx-lm's own, with the normal (dense) head.
    """
    return all(vars(owner).get(name) is imported for (owner, name), imported in _LOOPS.items())


def replaced_names() -> dict[str, Any]:
    """What now stands where mlx-lm's loops or batches look up a name, of those that were replaced.

    Returns:
        By the place and the name, as in "GenerationBatch._step".
    """
    found = {}
    for (owner, name), imported in _BATCHES.items():
        now = vars(owner).get(name)
        if now is not imported:
            found[f"{owner.__name__}.{name}"] = now
    return found


@cache
def digest(thing: Any) -> str:
    """Returns the digest of the text of a function or a module; "" if there is none."""
    try:
        return sha256(getsource(thing).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def nested_codes(*functions: Any) -> set[CodeType]:
    """The codes of the functions that are made within others."""
    codes = set()
    for function in functions:
        for constant in function.__code__.co_consts:
            if isinstance(constant, CodeType):
                codes.add(constant)
    return codes


def is_omlx_sampler(sampler: FunctionType) -> bool:
    """Whether oMLX has made a sampler, in the way that is known."""
    name, text = OMLX_SAMPLING
    module = sys.modules.get(name)
    if module is None or digest(module) != text:
        return False
    return sampler.__code__ in nested_codes(vars(module)["make_sampler"])


# The classes of caches, and their functions as they were first seen.
_cache_classes: dict[type, dict[str, Any]] = {}


def _functions_of(cls: type) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        named.update(vars(base))
    # Copying a cache leaves it there.
    named.pop("__slotnames__", None)
    return named


def _note(module: ModuleType) -> None:
    for cls in vars(module).values():
        if isinstance(cls, type) and issubclass(cls, module._BaseCache):
            _cache_classes.setdefault(cls, _functions_of(cls))


_note(mlx_lm_cache)


def are_librarys_caches(layers: Iterable[Any]) -> bool:
    """Whether all caches, and each one in them, are of libraries' classes and have their functions.

    Args:
        layers: What ``make_prompt_cache`` makes, or anything that a caller has given.
    """
    layers = list(layers)
    for cls in set(map(type, layers)):
        if cls not in _cache_classes and cls.__module__ == "mlx_vlm.models.cache":
            _note(sys.modules[cls.__module__])
        if _cache_classes.get(cls) != _functions_of(cls):
            return False
    if any(callable(value) for layer in layers for value in vars(layer).values()):
        return False
    return all(are_librarys_caches(layer.caches) for layer in layers if hasattr(layer, "caches"))
