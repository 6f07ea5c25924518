"""What a model is made of, and whether it still is: arrays, layers, and functions of mlx-lm."""

from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from operator import is_
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.model_code import global_names, library_functions


class ModelParts:
    """The parts of a model at one time. It does not hold the model itself."""

    def __init__(self, model: nn.Module):
        parts = list(containers(model))
        self._type = type(model)
        self._own = _contents(model)
        self._others = [(part, type(part), _contents(part)) for part in parts[1:]]
        self._functions = _functions_of(parts)
        self._globals = _globals_of(self._functions)
        # Arrays that the model itself replaces by equal ones, by the ids of parts and by indices.
        self._renewed: dict[int, dict[int, mx.array]] = {}

    def are_of(self, model: nn.Module) -> bool:
        """Whether a model has the very same parts: nothing was replaced, added or taken away.

        It may have other arrays where its own steps replace them.
        """
        if type(model) is not self._type or not _same(_contents(model), self._own):
            return False
        for part, cls, held in self._others:
            if type(part) is not cls:
                return False
            if not _same(_contents(part), held, self._renewed.get(id(part), ())):
                return False
        return self._has_same_functions()

    def _has_same_functions(self) -> bool:
        """Whether its classes have the same functions of mlx-lm, and these find the same names."""
        for owner, name, function in self._functions:
            if vars(owner).get(name) is not function:
                return False
        return all(names.get(name) is value for names, name, value in self._globals)

    def note_renewed(self, model: nn.Module) -> bool:
        """Notes which arrays a model has replaced by equal ones, in a step that it has taken.

        Returns:
            Whether nothing else of its parts has changed.
        """
        if not _same(_contents(model), self._own):
            return False
        for part, _, held in self._others:
            now = _contents(part)
            if len(now) != len(held):
                return False
            for i, (new, old) in enumerate(zip(now, held, strict=True)):
                if new is not old:
                    if not (isinstance(new, mx.array) and isinstance(old, mx.array)):
                        return False
                    self._renewed.setdefault(id(part), {})[i] = old
        return self.renewed_are_equal()

    def renewed_are_equal(self) -> bool:
        """Whether arrays that the model's own steps replace are still equal. Evaluates them."""
        pairs: list[tuple[mx.array, mx.array]] = []
        for part, _, _ in self._others:
            renewed = self._renewed.get(id(part))
            if renewed is None:
                continue
            now = _contents(part)
            pairs += [(now[i], old) for i, old in renewed.items()]
        if any(new.shape != old.shape or new.dtype != old.dtype for new, old in pairs):
            return False
        return all(mx.array_equal(new, old).item() for new, old in pairs)


def _functions_of(parts: list[Any]) -> list[tuple[type, str, FunctionType]]:
    """The functions of mlx-lm that the classes of a model's modules have, each once."""
    classes = dict.fromkeys(type(part) for part in parts if isinstance(part, nn.Module))
    functions: dict[tuple[type, str, FunctionType], None] = {}
    for cls in classes:
        functions |= dict.fromkeys(library_functions(cls))
    return list(functions)


def _globals_of(
    functions: list[tuple[type, str, FunctionType]],
) -> list[tuple[dict[str, Any], str, Any]]:
    """The globals that functions use: where each is looked up, its name, and what it is."""
    found = []
    for _, _, function in functions:
        names = function.__globals__
        for name in global_names(function):
            found.append((names, name, names[name]))
    return found


def containers(model: nn.Module) -> Iterator[Any]:
    """A model, and all modules, lists and dictionaries in it."""
    seen = set()
    left: list[Any] = [model]
    while left:
        value = left.pop()
        if isinstance(value, nn.Module | list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            yield value
            left += _contents(value)


def settings_in(model: nn.Module) -> Iterator[Any]:
    """The objects with settings that a model's parts hold, such as ``args``: dataclasses."""
    for part in containers(model):
        for value in _contents(part):
            if is_dataclass(value):
                yield value


def _contents(container: Any) -> list[Any]:
    """The values that a module, a list or a dictionary holds."""
    if isinstance(container, nn.Module):
        return [*dict.values(cast(Any, container)), *vars(container).values()]
    if isinstance(container, dict):
        return list(container.values())
    return list(container)


def _same(one: list[Any], other: list[Any], but_for: Collection[int] = ()) -> bool:
    """Whether two lists hold the very same values, but for those with some indices."""
    if len(one) != len(other):
        return False
    if not but_for:
        return all(map(is_, one, other))
    return all(i in but_for or one[i] is other[i] for i in range(len(one)))
