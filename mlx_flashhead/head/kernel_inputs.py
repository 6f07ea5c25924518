"""Inputs of the kernels that a call may lack: full arrays take their places.

They exist before the first token, so that no token makes them. ``short_inputs.py`` says why each
has 8 elements or more.
"""

from functools import cache
from typing import cast

import mlx.core as mx
import numpy as np

from .adjustment import ADJUST_HEAD
from .proposal import Selection, Unscored
from .short_inputs import SHORTEST

# The constants of the same names in metal/flash_head/constants.h.
MIN_PROBES = SHORTEST
UNSCORED = SHORTEST


def unscored_input(selection: Selection) -> mx.array:
    """What was not scored, for a kernel: (R, UNSCORED)."""
    if selection.unscored_input is not None:
        return selection.unscored_input
    best, mass = cast(Unscored, selection.unscored)  # by MLX's operations
    zeros = mx.zeros((len(best), UNSCORED - 2))
    return mx.concatenate([best, mx.zeros_like(best) if mass is None else mass, zeros], axis=-1)


@cache
def nothing_changed(n_positions: int, vocab_size: int) -> tuple[mx.array, mx.array]:
    """The words of an adjustment that changes nothing, and latest tokens of V, which is none."""
    n_rows = max(n_positions, SHORTEST)
    words = np.zeros((n_rows, ADJUST_HEAD), np.uint32)
    return mx.array(words), mx.array(np.full(n_rows, vocab_size, np.uint32))


@cache
def no_mask(vocab_size: int) -> mx.array:
    """An array (1, …) that is no mask: the kernel knows it by its length."""
    return mx.array(np.zeros((1, -(-vocab_size // 32) + SHORTEST), np.uint32))
