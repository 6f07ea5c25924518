"""Products of a model's layers by numpy, for CPUs on which MLX's own are slow.

Each is evaluated at once, which pays for prompts and batches. docs/how-it-works.md has figures.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .observed import with_methods


def numpy_is_faster() -> bool:
    """Whether MLX computes on a CPU without Apple's Accelerate."""
    return mx.default_device().type == mx.cpu and sys.platform != "darwin"


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


def _floats(array: mx.array) -> np.ndarray:
    """The array in float32; one that is so already is a view of MLX's memory."""
    return np.asarray(array.astype(mx.float32))


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    """The layer's rows times x: (…, D) → (…, V) of the dtype of x."""
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        weight = mx.dequantize(
            weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
        )
    product = to_mlx(_floats(x).reshape(-1, x.shape[-1]) @ _floats(weight).T)
    product = product.reshape(*x.shape[:-1], len(weight)).astype(x.dtype)
    return product + layer.bias if "bias" in layer else product


def to_mlx(array: np.ndarray) -> mx.array:
    """An array of numpy as one of MLX."""
    # mx.array of a numpy array loses a Ctrl-C that comes meanwhile, a memoryview does not
    return mx.array(memoryview(array))  # type: ignore[arg-type]


def slot_products(rows: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Products of rows in clusters with states.

    Args:
        rows: Rows (C, n, D) float32, in memory by rows or by columns.
        states: States (k, D) float32.

    Returns:
        The products (k, C, n).
    """
    if rows.flags.c_contiguous:
        return (states @ rows.reshape(-1, rows.shape[-1]).T).reshape(-1, *rows.shape[:2])
    products = np.matmul(states[None], rows.swapaxes(1, 2))  # (C, k, n)
    return np.ascontiguousarray(products.swapaxes(0, 1))
