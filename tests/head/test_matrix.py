"""The rows of a head: formats against what MLX quantizes to, products, and the fingerprint."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_flashhead.head.matrix import FORMATS, Matrix, affine_group
from mlx_flashhead.models.locate import HeadLocation

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
QUANTIZED = [(form, group) for form in FORMATS for group in form.group_sizes]
FORMS = [None, *(form for form in FORMATS if form.group_sizes)]


def random(*shape, seed=0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("form, group_size", QUANTIZED, ids=str)
def test_quantized_formats_are_mlxs(form, group_size):
    floats = Matrix(random(6, 256).astype(mx.bfloat16))
    matrix = floats.quantize(bits=form.bits, group_size=group_size, mode=form.mode)
    assert tuple(matrix.arrays()) == form.arrays
    assert matrix.format is form and matrix.quantized
    assert (matrix.n_rows, matrix.hidden_size) == (6, 256)


def test_all_that_mlx_can_quantize_to_is_there():
    found = set()
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        for bits in range(1, 17):
            for group_size in (8, 16, 32, 64, 128, 256):
                form = {"mode": mode, "bits": bits, "group_size": group_size}
                try:
                    mx.eval(mx.quantize(mx.zeros((1, 256)), **form))
                except ValueError:
                    continue
                found.add((mode, bits, group_size))
    assert found == {(form.mode, form.bits, group_size) for form, group_size in QUANTIZED}


@pytest.mark.parametrize(
    "matrix, said",
    [
        (Matrix(mx.zeros((1, 1)), mx.zeros(1), bits=7), "'7-bit affine'"),
        (Matrix(mx.zeros((1, 1), mx.complex64)), "'64-bit float'"),
    ],
)
def test_other_formats(matrix, said):
    with pytest.raises(ValueError, match=f"{said} are not supported: .* are 32-bit float, 16"):
        _ = matrix.format


@pytest.mark.parametrize("width, first, group", [
    (128, 64, 64), (128, 128, 128), (64, 128, 32), (96, 64, 32), (48, 64, None), (33, 64, None),
])  # fmt: skip
def test_group_that_fits(width, first, group):
    assert affine_group(width, first) == group


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
    expected, actual = layer(hidden), rows.matmul(hidden)
    assert actual.dtype == expected.dtype == rows.logits_dtype(hidden_dtype)
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}[actual.dtype]
    assert mx.abs((actual - expected).astype(mx.float32)).max() <= tolerance


def test_fingerprint_is_of_the_stored_rows():
    def stored(seed):
        return Matrix(random(500, 32, seed=seed)).quantize(bits=4, group_size=32, mode="affine")

    rows = stored(3)
    assert rows.fingerprint == stored(3).fingerprint and len(rows.fingerprint) == 64
    changed = {
        "first row": replace(rows, weight=rows.weight.at[0, 0].add(1)),
        "last row": replace(rows, weight=rows.weight.at[499, 0].add(1)),
        "scales": replace(rows, scales=rows.scales * 2),
        "offsets": replace(rows, biases=rows.biases + 1),
        "dtype": replace(rows, scales=rows.scales.view(mx.int32)),  # of the same bytes
        "number of rows": rows.take(mx.arange(499)),
        "other rows": stored(4),
        "order": rows.take(mx.arange(499, -1, -1)),
    }
    for what, other in changed.items():
        assert other.fingerprint != rows.fingerprint, what
    for dtype in DTYPES:
        for n_rows in (1, 7, 64, 65):
            floats = Matrix(random(n_rows, 8).astype(dtype))
            other = replace(floats, weight=floats.weight.at[n_rows // 2, 3].add(1))
            assert floats.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "change, fits",
    [
        ({}, True),
        ({"scales": 2.0**-13}, True),
        ({"scales": 2.0**-14 * (1 + 2.0**-7) * 2.0**-9}, False),  # bits are lost below 2^-14
        ({"scales": 70_000.0}, False),
        ({"biases": 70_000.0}, False),
        ({"bias": 1e-6}, False),
        ({"biases": None, "mode": "mxfp4"}, False),
    ],
)
def test_rows_that_are_the_same_in_float16(change, fits):
    matrix = Matrix(random(8, 64).astype(mx.bfloat16), bias=mx.ones(8, mx.bfloat16))
    matrix = matrix.quantize(bits=4, group_size=32)
    values = {name: mx.full(getattr(matrix, name).shape, value, mx.bfloat16)
              for name, value in change.items() if isinstance(value, float)}  # fmt: skip
    changed = replace(matrix, **change | values)
    found = changed.in_float16()
    assert (found is not None) == fits
    if found is not None:
        assert found.scales.dtype == found.biases.dtype == found.bias.dtype == mx.float16
        assert mx.array_equal(found.dequantized(mx.float32), changed.dequantized(mx.float32))
    assert Matrix(random(8, 64)).in_float16() is None
