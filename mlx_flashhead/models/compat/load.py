"""``mlx_lm.load`` in programs that know nothing of FlashHead: another function in its place."""

import sys
from collections.abc import Callable
from typing import Any

import mlx_lm

Load = Callable[..., Any]


def wrap_load(wrap: Callable[[Load], Load]) -> None:
    """Puts a function in the place of ``mlx_lm.load``, for the rest of the process.

    Modules that are imported later take it from ``mlx_lm`` or ``mlx_lm.utils``. Those of mlx-lm
    that have been imported already get it where they have taken the original.

    Args:
        wrap: Makes the function from the original.
    """
    original = mlx_lm.load
    replacement = wrap(original)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] == "mlx_lm":
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, replacement)
