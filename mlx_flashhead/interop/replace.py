"""Replaces what has a name in another package, for the rest of the process."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

Wrap = Callable[[Any], Any]  # from what has a name to what gets it


def put_in_place(place: str, wrap: Wrap) -> None:
    """Replaces an object, also in all imported modules of its package.

    Args:
        place: Its name, such as "mlx_lm.utils.load".
        wrap: Makes the replacement of the original.
    """
    module, _, name = place.rpartition(".")
    original = getattr(import_module(module), name)
    package = module.split(".")[0]
    replacement = wrap(original)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").split(".")[0] == package:
            for held, value in list(vars(other).items()):
                if value is original:
                    setattr(other, held, replacement)


def put_all_in_place(wraps: Mapping[str, Wrap]) -> None:
    """Replaces names by their places; one of a module that is not installed is left out."""
    for place, wrap in wraps.items():
        with suppress(ImportError):  # mlx-vlm before 0.7 has its loop elsewhere
            put_in_place(place, wrap)
