"""Inputs of kernels that a call may lack, or that may be short.

MLX passes an array of fewer than 8 elements in another address space than a longer one, so that the
kernel has another text, which is compiled when it first occurs: in the middle of an answer. So none
is shorter, and full arrays take the places of those that a call lacks. These exist before the first
token, so that no token makes them.
"""

from functools import cache

import mlx.core as mx
import numpy as np

from .adjustment import ADJUST_HEAD

# From so many elements on an array is passed like all longer ones.
SHORTEST = 8

# The constants of the same names in metal/flash_head/constants.h.
MIN_PROBES = SHORTEST
UNSCORED = SHORTEST


def long_enough(array: mx.array) -> mx.array:
    """The array, or one of SHORTEST or more elements that begins with it in memory."""
    if array.size >= SHORTEST or array.size == 0:
        return array
    return mx.contiguous(mx.broadcast_to(array[None], (SHORTEST, *array.shape)))


@cache
def nothing_changed(n_positions: int, vocab_size: int) -> tuple[mx.array, mx.array]:
    """The words of an adjustment that changes nothing, and latest tokens of V, which is none."""
    n_filled = max(n_positions, SHORTEST)
    words = np.zeros((n_filled, ADJUST_HEAD), np.uint32)
    return mx.array(words), mx.array(np.full(n_filled, vocab_size, np.uint32))


@cache
def no_mask(vocab_size: int) -> mx.array:
    """An array (1, …) that is no mask: the kernel knows it by its length."""
    return mx.array(np.zeros((1, -(-vocab_size // 32) + SHORTEST), np.uint32))
