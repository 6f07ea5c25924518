"""The rows of a head: formats against what MLX quantizes to, products, and the fingerprint."""

from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashhead.head.matrix import FORMATS, Matrix
from mlx_flashhead.models.locate import HeadLocation

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
FORMS = [None, *(form for form in FORMATS if form.group_sizes)]


def random(*shape, seed=0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_the_quantized_formats_are_all_that_mlx_has():
    floats = Matrix(random(6, 256).astype(mx.bfloat16))
    found = set()
    modes = ("affine", "mxfp4", "mxfp8", "nvfp4")
    group_sizes = (8, 16, 32, 64, 128, 256)
    for mode, bits, group_size in product(modes, range(1, 17), group_sizes):
        try:
            matrix = floats.quantize(bits=bits, group_size=group_size, mode=mode)
        except ValueError:
            continue
        assert tuple(matrix.arrays()) == matrix.format.arrays and matrix.quantized
        assert (matrix.n_rows, matrix.hidden_size) == (6, 256)
        found.add((matrix.format, group_size))
    assert found == {(form, size) for form in FORMATS for size in form.group_sizes}


def test_other_formats():
    for matrix, said in (
        (Matrix(mx.zeros((1, 1)), mx.zeros(1), bits=7), "'7-bit affine'"),
        (Matrix(mx.zeros((1, 1), mx.complex64)), "'64-bit float'"),
    ):
        with pytest.raises(ValueError, match=f"{said} are not supported: .* are 32-bit float, 16"):
            _ = matrix.format


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_is_the_layers_product(form, dtype, hidden_dtype, bias):
    layer = nn.Linear(64, 37, bias=bias)
    layer.weight = random(37, 64) / 2
    layer.set_dtype(dtype)
    if form is not None:
        layer = layer.to_quantized(form.group_sizes[0], form.bits, form.mode)
    rows = HeadLocation(layer, "lm_head", "__call__").rows()
    hidden = random(2, 3, 64, seed=1).astype(hidden_dtype)
    expected = layer(hidden)
    actual = rows.matmul(hidden)
    assert actual.dtype == expected.dtype == rows.logits_dtype(hidden_dtype)
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}[actual.dtype]
    assert mx.abs((actual - expected).astype(mx.float32)).max() <= tolerance


def test_fingerprint_is_of_the_stored_rows():
    def stored(seed):
        return Matrix(random(500, 32, seed=seed)).quantize(bits=4, group_size=32, mode="affine")

    rows = stored(3)
    others = [
        stored(3),
        replace(rows, weight=rows.weight.at[0, 0].add(1)),
        replace(rows, weight=rows.weight.at[499, 0].add(1)),
        replace(rows, scales=rows.scales * 2),
        replace(rows, biases=rows.biases + 1),
        # The bytes are the same.
        replace(rows, scales=rows.scales.view(mx.int32)),
        rows.take(mx.arange(499)),
        stored(4),
        rows.take(mx.arange(499, -1, -1)),
    ]
    same = [other.fingerprint == rows.fingerprint for other in others]
    assert same == [True] + 8 * [False] and len(rows.fingerprint) == 64
    for dtype in DTYPES:
        for n_rows in (1, 7, 64, 65):
            floats = Matrix(random(n_rows, 8).astype(dtype))
            other = replace(floats, weight=floats.weight.at[n_rows // 2, 3].add(1))
            assert floats.fingerprint != other.fingerprint


def test_rows_that_are_the_same_in_float16():
    matrix = Matrix(random(8, 64).astype(mx.bfloat16), bias=mx.ones(8, mx.bfloat16))
    matrix = matrix.quantize(bits=4, group_size=32)
    found = matrix.in_float16()
    assert found.scales.dtype == found.biases.dtype == found.bias.dtype == mx.float16
    assert mx.array_equal(found.dequantized(mx.float32), matrix.dequantized(mx.float32))
    for name, value, fits in (
        ("scales", 2.0**-13, True),
        # Bits are lost below 2^-14.
        ("scales", 2.0**-14 * (1 + 2.0**-7) * 2.0**-9, False),
        ("scales", 70_000.0, False),
        ("biases", 70_000.0, False),
        ("bias", 1e-6, False),
    ):
        values = mx.full(getattr(matrix, name).shape, value, mx.bfloat16)
        assert (replace(matrix, **{name: values}).in_float16() is not None) == fits
    assert replace(matrix, biases=None, mode="mxfp4").in_float16() is None
    assert Matrix(random(8, 64)).in_float16() is None
