"""Layers that multiply by numpy give what MLX gives."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_flashhead.models import cpu_products
from mlx_flashhead.models.cpu_products import numpy_products
from tiny_models import tiny_model

TOKENS = mx.array([[5, 9, 2, 7, 1, 30, 31], [6, 6, 40, 3, 2, 1, 0]])


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(cpu_products, "numpy_is_faster", lambda: True)
    mx.random.seed(0)


def check(function, atol):
    """A function gives the same as it is, and within the block."""
    expected = function()
    mx.eval(expected)
    with numpy_products():
        found = function()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    found, expected = (np.array(array.astype(mx.float32)) for array in (found, expected))
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "minicpm"])
def test_whole_models(arch):
    model = tiny_model(arch)
    check(lambda: model(TOKENS), 2e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("make", [nn.Linear, nn.Embedding])
def test_layers(make, bits, dtype):
    layer = make(64, 64)
    layer.set_dtype(dtype)
    layer = layer if bits is None else layer.to_quantized(bits=bits)
    x = mx.random.normal((2, 3, 64)).astype(dtype)
    product = getattr(layer, "as_linear", layer)
    check(lambda: product(x), 0.1 if dtype != mx.float32 else 1e-4)


@pytest.mark.parametrize("mask", [None, "causal", "bool", "additive"])
@pytest.mark.parametrize("length", [1, 5])
def test_attention(mask, length):
    shape = (2, 4, length, 7)
    if mask == "bool":
        mask = mx.random.uniform(shape=shape) > 0.3
    elif mask == "additive":
        mask = mx.random.normal(shape)
    q = mx.random.normal((2, 4, length, 16))
    k, v = mx.random.normal((2, 2, 7, 16)), mx.random.normal((2, 2, 7, 8))
    check(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask), 1e-5)


def test_one_layer_may_stay_lazy_and_all_is_as_before_after_the_block(monkeypatch):
    before = [cls.__dict__[name] for cls, name in cpu_products.METHODS]
    attention, seen = mx.fast.scaled_dot_product_attention, []
    lazy, other = nn.Linear(64, 8), nn.Linear(64, 8)
    monkeypatch.setattr(cpu_products, "_product", lambda layer, x: seen.append(layer))
    with pytest.raises(KeyError), numpy_products(lazy):
        lazy(mx.zeros((1, 64)))
        other(mx.zeros((1, 64)))
        raise KeyError
    assert seen == [other]
    assert [cls.__dict__[name] for cls, name in cpu_products.METHODS] == before
    assert mx.fast.scaled_dot_product_attention is attention
    monkeypatch.setattr(cpu_products, "numpy_is_faster", lambda: False)
    with numpy_products():
        assert nn.Linear.__call__ is before[0]
