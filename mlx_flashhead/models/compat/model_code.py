"""The code of mlx-lm's models: their functions, the names in them, and copies with other globals.

The names were read in mlx-lm 0.31.3 and 0.32.2 (``mlx_lm.models``). Of what is not public, there
are the code objects of Python's functions, by which these recognise what a function does.
"""

from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

# An attention hands keys and values to this method of its cache.
UPDATE = "update_and_fetch"
# The argument in which a layer gets its cache.
CACHE = "cache"
# The first arguments of a rotation that is mlx-lm's own.
ROTATES = ("self", "x", "offset")


def library_functions(cls: type) -> Iterator[tuple[type, str, FunctionType]]:
    """The functions that a class has of mlx-lm: the class of each, its name, and the function."""
    for base in cls.__mro__:
        if base.__module__.startswith("mlx_lm."):
            for name, value in vars(base).items():
                if isinstance(value, FunctionType):
                    yield base, name, value


def global_names(function: FunctionType) -> list[str]:
    """The names of globals that a function's code uses."""
    code = function.__code__
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += constant.co_names
    return [name for name in dict.fromkeys(names) if name in function.__globals__]


def with_globals(function: FunctionType, name: str, others: Mapping[str, Any]) -> FunctionType:
    """A copy of a function that has a name, and some other globals."""
    copied = FunctionType(
        function.__code__,
        {**function.__globals__, **others},
        name,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def is_attention(cls: type) -> bool:
    """Whether a class's call, if it is mlx-lm's, hands keys and values to a cache."""
    call = _call_of(cls)
    return call is not None and UPDATE in call.co_names


def takes_cache(cls: type) -> bool:
    """Whether a class's call, if it is mlx-lm's, gets a cache."""
    call = _call_of(cls)
    return call is not None and CACHE in call.co_varnames[: call.co_argcount]


def is_rotation(cls: type) -> bool:
    """Whether a class's call is a rotation of mlx-lm's that asks for the number of positions."""
    call = _call_of(cls)
    return call is not None and call.co_varnames[:3] == ROTATES and "shape" in call.co_names


def _call_of(cls: type) -> CodeType | None:
    for _, name, function in library_functions(cls):
        if name == "__call__":
            return function.__code__
    return None


def files_of(*functions: Any) -> list[str]:
    """The files that functions were written in, but for those that are not of Python."""
    return [each.__code__.co_filename for each in functions if hasattr(each, "__code__")]
