"""``mlx_vlm.load`` in programs that know nothing of FlashHead: another function in its place."""

from collections.abc import Callable
from typing import Any

from ..imports import put_in_place, when_imported

Load = Callable[..., Any]


def wrap_load(wrap: Callable[[Load], Load]) -> None:
    """Puts a function in the place of ``mlx_vlm.load``, as soon as a program imports mlx-vlm.

    Args:
        wrap: Makes the function from the original.
    """
    when_imported(
        "mlx_vlm.utils",
        lambda module: put_in_place("mlx_vlm", module, "load", wrap(module.load)),
    )
