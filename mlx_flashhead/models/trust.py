"""Whether a model is what its library makes of it, so that its text is known to be mlx-lm's."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.nn as nn

from .compat.model_code import files_of
from .flash_modules import FlashModule
from .install import ROOT

LIBRARIES = ("mlx", "mlx_lm", "mlx_vlm")


def is_recognised(model: Any) -> bool:
    """Whether a model is the one that got its FlashHead, or a copy of it, and unchanged.

    A module around a model, or a changed one, may do anything with a text's tokens.
    """
    return is_librarys_model(model) and ROOT in vars(model)


def is_librarys_model(model: Any) -> bool:
    """Whether all parts of a model are of classes of mlx, mlx-lm or mlx-vlm, as they are there.

    Nobody has replaced their calls, and it is not being trained: dropout draws in each step.
    """
    if not isinstance(model, nn.Module) or model.training:
        return False
    classes: set[Any] = set(map(type, model.modules()))
    return all(map(_is_libraries, classes))


def _is_libraries(cls: Any) -> bool:
    """Whether a class is the one that its library has under its name, and its call is its own."""
    if issubclass(cls, FlashModule):
        # It is this package's, beside the one of the library.
        cls = cls.__bases__[1]
    home = sys.modules.get(cls.__module__)
    if getattr(home, cls.__qualname__, None) is not cls:
        return False
    calls: list[Any] = [getattr(cls, name, None) for name in ("__call__", "as_linear")]
    from_library = cls.__module__.split(".")[0] in LIBRARIES
    return from_library and all(map(_in_libraries, files_of(*calls)))


@cache
def _in_libraries(filename: str) -> bool:
    """Whether a file of code is one of the libraries'."""
    file = Path(filename)
    for name in LIBRARIES:
        if name in sys.modules:
            folders = sys.modules[name].__path__
            if any(file.is_relative_to(folder) for folder in folders):
                return True
    return False
