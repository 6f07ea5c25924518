"""The rows of a head: products, dtypes, and the fingerprint."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_flashhead.head.formats import FORMATS
from tiny_models import random_rows

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# bits, group size, mode
FORMS = [(None, 32, "affine")] + [
    (one.bits, one.group_sizes[0], one.mode) for one in FORMATS if one.group_sizes
]
ids = [f"{mode}{bits}" if bits else "floats" for bits, _, mode in FORMS]


def linear_layer(rows) -> nn.Module:
    """The mlx layer that holds these rows."""
    if rows.quantized:
        layer = nn.QuantizedLinear(
            rows.hidden_size, rows.n_rows, bias=rows.bias is not None, **rows.quantization
        )
    else:
        layer = nn.Linear(rows.hidden_size, rows.n_rows, bias=rows.bias is not None)
    layer.update(rows.arrays())
    return layer


@pytest.mark.parametrize("bits, group_size, mode", FORMS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_is_the_layers_product(bits, group_size, mode, dtype, hidden_dtype, bias):
    rng = np.random.default_rng(0)
    rows = random_rows(
        rng, 37, 64, dtype=dtype, bits=bits, group_size=group_size, mode=mode, bias=bias
    )
    hidden = mx.array(rng.normal(size=(2, 3, 64)).astype(np.float32)).astype(hidden_dtype)
    expected = linear_layer(rows)(hidden)
    actual = rows.matmul(hidden)
    assert actual.dtype == expected.dtype == rows.logits_dtype(hidden_dtype)
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}[actual.dtype]
    assert mx.allclose(
        actual.astype(mx.float32), expected.astype(mx.float32), rtol=0, atol=tolerance
    )


def test_fingerprint_is_of_the_stored_rows():
    rows = random_rows(np.random.default_rng(3), 500, 32, bits=4)
    again = random_rows(np.random.default_rng(3), 500, 32, bits=4)
    assert rows.fingerprint == again.fingerprint
    assert len(rows.fingerprint) == 64
    changed = {
        "first row": replace(rows, weight=rows.weight.at[0, 0].add(1)),
        "last row": replace(rows, weight=rows.weight.at[499, 0].add(1)),
        "scales": replace(rows, scales=rows.scales * 2),
        "offsets": replace(rows, biases=rows.biases + 1),
        "dtype": replace(rows, scales=rows.scales.view(mx.int32)),  # of the same bytes
        "number of rows": rows.take(mx.arange(499)),
        "other rows": random_rows(np.random.default_rng(4), 500, 32, bits=4),
        "order": rows.take(mx.arange(499, -1, -1)),
    }
    for what, other in changed.items():
        assert other.fingerprint != rows.fingerprint, what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 64, 65])
def test_fingerprint_of_any_size(dtype, vocab_size):
    rows = random_rows(np.random.default_rng(5), vocab_size, 8, dtype=dtype)
    other = replace(rows, weight=rows.weight.at[vocab_size // 2, 3].add(1))
    assert rows.fingerprint != other.fingerprint
