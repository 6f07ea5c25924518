"""Functions of other packages that are known by their text: another version of one is not."""

import sys
from functools import cache
from hashlib import sha256
from inspect import getsource
from types import CodeType, FunctionType
from typing import Any

# oMLX's samplers (flyto-mlx 0.7.0): those of mlx-lm 0.31, without mx.compile.
OMLX_SAMPLING = ("omlx.utils.sampling", "c76da93ba87cca11")


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
