"""``mlx_lm.load`` in programs that know nothing of FlashHead: another function in its place."""

import importlib
from collections.abc import Callable
from typing import Any

import mlx_lm

from .imports import put_in_place

Load = Callable[..., Any]


def wrap_load(wrap: Callable[[Load], Load]) -> None:
    """Puts a function in the place of ``mlx_lm.load``, for the rest of the process.

    Modules that are imported later take it from ``mlx_lm`` or ``mlx_lm.utils``. Those of mlx-lm
    that have been imported already get it where they have taken the original.

    Args:
        wrap: Makes the function from the original.
    """
    put_in_place("mlx_lm", mlx_lm, "load", wrap(mlx_lm.load))


def wrap_generate_step(wrap: Callable[[Load], Load]) -> None:
    """Puts a function in the place of mlx-lm's ``generate_step``, in the same way."""
    module = importlib.import_module("mlx_lm.generate")
    put_in_place("mlx_lm", module, "generate_step", wrap(module.generate_step))
