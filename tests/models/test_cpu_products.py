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


def check(model, function, atol):
    """A function of a model gives the same as it is, and within the block."""
    expected = function()
    mx.eval(expected)
    with numpy_products(model):
        found = function()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    found, expected = (np.array(array.astype(mx.float32)) for array in (found, expected))
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "minicpm"])
def test_whole_models(arch):
    model = tiny_model(arch)
    check(model, lambda: model(TOKENS), 2e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("make", [nn.Linear, nn.Embedding])
def test_layers(make, bits, dtype):
    layer = make(64, 64)
    layer.set_dtype(dtype)
    if bits is not None:
        layer = layer.to_quantized(bits=bits)
    x = mx.random.normal((2, 3, 64)).astype(dtype)
    atol = 1e-4 if dtype == mx.float32 else 0.1
    if make is nn.Embedding:
        check(layer, lambda: layer.as_linear(x), atol)
    else:
        check(layer, lambda: layer(x), atol)


def test_one_layer_may_stay_lazy_and_all_is_as_before_after_the_block(monkeypatch):
    seen = []
    both = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    lazy, other = both.layers
    classes = [type(module) for module in both.modules()]
    methods = dict(vars(nn.Linear))
    monkeypatch.setattr(cpu_products, "_product", lambda layer, x: seen.append(layer))
    with pytest.raises(KeyError), numpy_products(both, lazy):
        # No class of MLX is changed.
        assert vars(nn.Linear) == methods
        lazy(mx.zeros((1, 64)))
        other(mx.zeros((1, 64)))
        raise KeyError
    assert seen == [other]
    assert [type(module) for module in both.modules()] == classes
    monkeypatch.setattr(cpu_products, "numpy_is_faster", lambda: False)
    with numpy_products(both):
        assert type(other) is nn.Linear
