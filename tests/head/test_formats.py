"""The table of formats, against what MLX quantizes to."""

import mlx.core as mx
import pytest

from mlx_flashhead.head.formats import FORMATS, affine_group, find_format
from mlx_flashhead.head.matrix import Matrix

QUANTIZED = [(one, group) for one in FORMATS for group in one.group_sizes]
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


@pytest.mark.parametrize("one, group_size", QUANTIZED, ids=lambda value: str(value))
def test_quantized_formats_are_mlxs(one, group_size):
    floats = Matrix(mx.random.normal((6, 256), key=mx.random.key(0)).astype(mx.bfloat16))
    matrix = floats.quantize(bits=one.bits, group_size=group_size, mode=one.mode)
    assert tuple(matrix.arrays()) == one.arrays
    assert matrix.format is one and matrix.quantized
    assert (matrix.n_rows, matrix.hidden_size) == (6, 256)
    assert matrix.nbytes == 6 * 256 * one.bytes_per_weight(group_size)


def test_all_that_mlx_can_quantize_to_is_there():
    weight = mx.zeros((1, 256))
    found = set()
    for mode in MODES:
        for bits in range(1, 17):
            for group_size in (8, 16, 32, 64, 128, 256):
                try:
                    mx.eval(mx.quantize(weight, group_size=group_size, bits=bits, mode=mode))
                except ValueError:
                    continue
                found.add((mode, bits, group_size))
    assert found == {(one.mode, one.bits, group_size) for one, group_size in QUANTIZED}


@pytest.mark.parametrize(
    "mode, bits, said", [("affine", 7, "'7-bit affine'"), (None, 64, "'64-bit float'")]
)
def test_other_formats(mode, bits, said):
    with pytest.raises(ValueError, match=f"{said} are not supported: .* are 32-bit float, 16"):
        find_format(mode, bits)


@pytest.mark.parametrize("width, first, group", [
    (128, 64, 64), (128, 128, 128), (64, 128, 32), (96, 64, 32), (48, 64, None), (33, 64, None),
])  # fmt: skip
def test_group_that_fits(width, first, group):
    assert affine_group(width, first) == group
