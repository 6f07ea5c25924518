"""``mlx.core``: what versions do otherwise."""

from importlib.metadata import version

import mlx.core as mx


def let_thread_draw() -> None:
    """Lets a thread besides the main one draw: up to 0.32.0 its compiled draws are all the same."""
    if version("mlx") in ("0.31.2", "0.32.0"):
        mx.disable_compile()
