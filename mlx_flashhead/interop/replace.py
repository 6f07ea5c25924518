"""Replaces what has a name in another package, for the rest of the process."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

# From what has a name to what gets it.
Wrap = Callable[[Any], Any]


def put_in_place(full_name: str, wrap: Wrap) -> None:
    """Replaces an object, also in all imported modules of its package.

    Args:
        full_name: Its name, such as "mlx_lm.utils.load".
        wrap: Makes the replacement of the original.
    """
    module, _, name = full_name.rpartition(".")
    original = getattr(import_module(module), name)
    package = module.split(".")[0]
    replacement = wrap(original)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").split(".")[0] == package:
            for held, value in list(vars(other).items()):
                if value is original:
                    setattr(other, held, replacement)


def put_all_in_place(wraps: Mapping[str, Wrap]) -> None:
    """Replaces objects by their full names; one of a module that is not installed is left out."""
    for full_name, wrap in wraps.items():
        # mlx-vlm before 0.7 has its loop elsewhere.
        with suppress(ImportError):
            put_in_place(full_name, wrap)
