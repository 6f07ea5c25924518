"""Caches of mlx-lm and mlx-vlm, recognised by identity.

A subclass may say that it can be trimmed because its parent can, and a replaced function may do
anything: what is not a library's own class, with the functions that it was imported with, is
unknown.
"""

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

_classes: dict[type, dict[str, Any]] = {}  # and their functions, as they were first seen


def _functions_of(cls: type) -> dict[str, Any]:
    named = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
    named.pop("__slotnames__", None)  # which copying a cache leaves there
    return named


def _note(module: ModuleType) -> None:
    for cls in vars(module).values():
        if isinstance(cls, type) and issubclass(cls, module._BaseCache):
            _classes.setdefault(cls, _functions_of(cls))


_note(mlx_lm_cache)


def are_librarys_caches(layers: Iterable[Any]) -> bool:
    """Whether all caches, and each one in them, are of libraries' classes and have their functions.

    Args:
        layers: What ``make_prompt_cache`` makes, or anything that a caller has given.
    """
    layers = list(layers)
    for cls in set(map(type, layers)):
        if cls not in _classes and cls.__module__ == "mlx_vlm.models.cache":
            _note(sys.modules[cls.__module__])
        if _classes.get(cls) != _functions_of(cls):
            return False
    if any(callable(value) for layer in layers for value in vars(layer).values()):
        return False
    return all(are_librarys_caches(layer.caches) for layer in layers if hasattr(layer, "caches"))
