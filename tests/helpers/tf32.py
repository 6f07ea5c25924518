"""TF32, in which an M5 multiplies several float32 states."""

import numpy as np


def in_tf32(values, cut_off: bool) -> np.ndarray:
    """Float32 with ten bits after the first, rounded to the nearest or cut off."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    if cut_off:
        rounded = bits
    else:
        rounded = bits + 0xFFF + (bits >> 13 & 1)
    return (rounded & 0xFFFFE000).astype(np.uint32).view(np.float32)
