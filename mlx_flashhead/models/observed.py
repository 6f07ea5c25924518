"""Calls of a model's layers go to other methods, for a block.

Each layer gets a subclass of its class for that time: no class of another package is changed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

# A layer and its arguments → what the call gives.
Method = Callable[..., Any]


@contextmanager
def with_methods(
    modules: Iterable[nn.Module], methods: Callable[[type], dict[str, Method]]
) -> Iterator[None]:
    """Within the block, calls of layers go to other methods.

    Args:
        modules: The layers.
        methods: The methods for a layer's class, by name; layers of a class without any stay.
    """
    classes: dict[type, type] = {}
    changed: list[tuple[nn.Module, type]] = []
    try:
        for module in modules:
            base = type(module)
            if base not in classes:
                classes[base] = _with_methods(base, methods(base))
            if classes[base] is not base:
                changed.append((module, base))
                module.__class__ = classes[base]
        yield
    finally:
        for module, base in changed:
            module.__class__ = base


def _with_methods(base: type, methods: dict[str, Method]) -> type:
    """A subclass of a class with other methods, under its names; the class itself without any."""
    if not methods:
        return base
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), methods | names)
