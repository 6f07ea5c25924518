"""Inputs of kernels that may be short.

MLX passes an array of fewer than 8 elements in another address space than a longer one, so that the
kernel has another text, which is compiled when it first occurs: in the middle of an answer. So none
is shorter.
"""

import mlx.core as mx

SHORTEST = 8  # elements, or rows, from which an array is passed like all longer ones


def long_enough(array: mx.array) -> mx.array:
    """The array, or one of SHORTEST or more elements that begins with it in memory."""
    if array.size >= SHORTEST or array.size == 0:
        return array
    return mx.contiguous(mx.broadcast_to(array[None], (SHORTEST, *array.shape)))
