"""How far two ways of computing the same number may lie apart: every margin, with its reason.

A choice is certain if it stays the same whatever the numbers are within these margins. So a margin
that is too small can change a text, and one that is too large costs time alone. The kernels have
those of their own functions in ``tally.h``, ``certain.h`` and ``logit_map.h`` of
``metal/flash_head/``, with the same values; ``tests/head/test_margins.py`` compares them.
"""

import mlx.core as mx

# Logits.

# Half the spacing of float32, relative.
FLOAT32 = 2.0**-24
# Spacings of 16 bits, relative: each of two logits is rounded to the nearest.
ULPS = 2
# A distance that was measured on a few states counts so many times.
MEASURED_TIMES = 4
# Products of several float32 states on an M5 and later: its matrix units take TF32, which keeps ten
# bits after the first. Rounded to the nearest each factor lies off by 2^-11, cut off by 2^-10.
# Source: `is_nax_available` and `enable_tf32` in MLX's matmul.cpp and quantized.cpp.
TF32 = 2.0**-9
# Spacings of float32 by which a tangent may fail to rise, or differ from MLX's.
MAP_ULPS = 8
# Spacings of 16 bits by which mlx-lm's samplers may draw from another log-probability: half of one
# each for it, for 1 / temperature, and for the product.
DRAW_SPACINGS = 1.5
# A dtype with a larger spacing has 16 bits.
IN_16_BITS = 1e-6

# Sums over all tokens, relative.

# Of masses in the screen: sums of many exponentials, in any order.
MASS_MARGIN = 1e-4
# Of masses in mlx-lm's filters: two such sums.
MASS_ROUNDING = 2e-4
# An addition of floats loses at most half a spacing of the sum, and no more than is added. MLX adds
# the weights of a draw, and so does the screen.
SUM_ROUNDING = 2.0**-23
# Spacings by which an exponential, or a product with the sum, may lie off.
EXP_UNITS = 64

# The smallest numbers above 0: what an exponential may lose beside its rounding.
SMALLEST_FLOAT16 = 2.0**-24
# This one is not flushed to 0. It is bfloat16's, too.
SMALLEST_FLOAT32 = 2.0**-126

# Noise.

# Two logarithms differ by so much of a noisy logit, or of 1 if that is more.
NOISE_MARGIN = 1e-5


def merging_distance(log_mass: mx.array, logit: mx.array, epsilon: float) -> mx.array:
    """Returns how far above a logit another one must lie for their log-probabilities to differ.

    Args:
        log_mass: The logarithm of the summed exponentials of all logits.
        logit: The lower logit.
        epsilon: The spacing of the log-probabilities' dtype, relative.
    """
    return (log_mass - logit + 0.5) * epsilon


def noise_margin(noisy: mx.array) -> mx.array:
    """Returns how far a noisy logit may lie from one with the noise of another implementation."""
    return NOISE_MARGIN * mx.maximum(1, mx.abs(noisy))
