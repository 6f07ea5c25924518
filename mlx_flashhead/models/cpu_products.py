"""Products of a model's layers by numpy, for CPUs on which MLX's own are slow.

Each is evaluated at once, which pays for prompts and batches. docs/how-it-works.md has figures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.backend import numpy_is_faster
from ..head.matrix import as_float32, to_mlx
from .observed import with_methods


@contextmanager
def numpy_products(model: nn.Module, lazy: nn.Module | None = None) -> Iterator[None]:
    """A block in which a model's layers multiply by numpy, if it is faster.

    Args:
        model: The model.
        lazy: A layer that stays as it is.
    """
    if not numpy_is_faster():
        yield
        return
    multiplied = [module for module in model.modules() if module is not lazy]
    with with_methods(multiplied, _methods_by_numpy):
        yield


def _methods_by_numpy(cls: type) -> dict[str, Any]:
    """The methods of a layer's class that numpy takes over, by name."""
    if cls in (nn.Linear, nn.QuantizedLinear):
        return {"__call__": _product}
    if cls in (nn.Embedding, nn.QuantizedEmbedding):
        return {"as_linear": _product}
    return {}


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    """The layer's rows times x: (…, D) → (…, V) of the dtype of x."""
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        weight = mx.dequantize(
            weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
        )
    states = as_float32(x).reshape(-1, x.shape[-1])
    product = to_mlx(states @ as_float32(weight).T)
    product = product.reshape(*x.shape[:-1], len(weight)).astype(x.dtype)
    if "bias" in layer:
        product = product + layer.bias
    return product
