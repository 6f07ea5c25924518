"""Values for each position of a step, on which code for one position works unchanged.

An attention whose formula for one token is another than that for several gets them in the place of
its arrays: each of its operations then runs once per position, as in single steps.
"""

import operator
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import mlx.core as mx

OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "getitem", "neg", "invert")


class Positions:
    """A value for each position: arrays, or whatever single steps would have there."""

    def __init__(self, parts: Iterable[Any]):
        self.parts = list(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = [getattr(part, name) for part in self.parts]
        if callable(found[0]):
            return per_position(
                lambda function, *args, **named: function(*args, **named), Positions(found)
            )
        return _gathered(found)

    def __bool__(self) -> bool:
        raise TypeError("Positions of a step differ where a single step takes one of two branches.")

    __hash__ = None  # type: ignore[assignment]


def _operator(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def operate(self: Positions, *others: Any) -> Any:
        if reflected:
            return per_position(function)(*others, self)
        return per_position(function)(self, *others)

    return operate


for _name in OPERATORS:
    _function = getattr(operator, f"__{_name}__")
    setattr(Positions, f"__{_name}__", _operator(_function))
    setattr(Positions, f"__r{_name}__", _operator(_function, reflected=True))
for _name in COMPARISONS:
    setattr(Positions, f"__{_name}__", _operator(getattr(operator, f"__{_name}__")))


def per_position(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """A function that is called once per position where an argument is a :class:`Positions`."""

    def call(*args: Any, **named: Any) -> Any:
        args = (*first, *args)
        n_positions = _number((args, named))
        if n_positions is None:
            return function(*args, **named)
        results = []
        for j in range(n_positions):
            own = {name: at(value, j) for name, value in named.items()}
            results.append(function(*at(args, j), **own))
        return _gathered(results)

    return call


def at(value: Any, j: int) -> Any:
    """What a value is at position ``j``."""
    if isinstance(value, Positions):
        return value.parts[j]
    if type(value) in (list, tuple):
        return type(value)(at(part, j) for part in value)
    if isinstance(value, slice):
        return slice(at(value.start, j), at(value.stop, j), at(value.step, j))
    return value


def _number(value: Any) -> int | None:
    """The number of positions of the first :class:`Positions` in a value, if there is one."""
    if isinstance(value, Positions):
        return len(value.parts)
    if isinstance(value, slice):
        value = value.start, value.stop, value.step
    if type(value) is dict:
        value = tuple(value.values())
    if type(value) not in (list, tuple):
        return None
    for part in value:
        n_positions = _number(part)
        if n_positions is not None:
            return n_positions
    return None


def _gathered(results: list[Any]) -> Any:
    """Results at each position as one: a value that all share, a tuple, or :class:`Positions`."""
    first = results[0]
    if type(first) in (list, tuple) and any(isinstance(part, mx.array) for part in first):
        return type(first)(Positions(parts) for parts in zip(*results, strict=True))
    if isinstance(first, mx.array):
        return Positions(results)
    if all(type(result) is type(first) and result == first for result in results):
        return first
    return Positions(results)


class Namespace:
    """A module such as ``mlx.core`` whose functions are called once per position."""

    def __init__(self, module: ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return per_position_value(getattr(self._module, name))


def per_position_value(value: Any) -> Any:
    """A name's value for code that has :class:`Positions` in the place of arrays."""
    if isinstance(value, ModuleType):
        return Namespace(value)
    if callable(value) and not isinstance(value, type):
        return per_position(value)
    return value
