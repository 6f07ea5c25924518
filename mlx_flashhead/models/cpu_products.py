"""Products of a model's layers by numpy, for CPUs on which MLX's own are slow (docs/how-it-
works.md). Each is evaluated at once, which pays for prompts and batches."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .compat.patching import replaced

METHODS = [(nn.Linear, "__call__"), (nn.QuantizedLinear, "__call__")]
METHODS += [(nn.Embedding, "as_linear"), (nn.QuantizedEmbedding, "as_linear")]


def numpy_is_faster() -> bool:
    """Whether MLX computes on a CPU without Apple's Accelerate."""
    return mx.default_device().type == mx.cpu and sys.platform != "darwin"


@contextmanager
def numpy_products(lazy: nn.Module | None = None) -> Iterator[None]:
    """A block in which layers multiply by numpy, if it is faster, but for a ``lazy`` one."""
    if not numpy_is_faster():
        yield
        return
    by_mlx = mx.fast.scaled_dot_product_attention

    def by_numpy(original):
        return lambda self, x: original(self, x) if self is lazy else _product(self, x)

    def attention(queries, keys, values, *, scale, mask=None, **others):
        if others.get("sinks") is not None:
            return by_mlx(queries, keys, values, scale=scale, mask=mask, **others)
        return _attention(queries, keys, values, scale, mask)

    with ExitStack() as stack:
        for cls, name in METHODS:
            stack.enter_context(replaced(cls, **{name: by_numpy(getattr(cls, name))}))
        stack.enter_context(replaced(mx.fast, scaled_dot_product_attention=attention))
        yield


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


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` by numpy: (B, H, L, D) → (B, H, L, D_v)."""
    batch, heads, length, width = queries.shape
    n_groups, n_keys = keys.shape[1:3]
    asked = (_floats(queries) * np.float32(scale)).reshape(batch, n_groups, -1, width)
    scores = (asked @ _floats(keys).swapaxes(-1, -2)).reshape(batch, heads, length, n_keys)
    if isinstance(mask, str):  # "causal"
        later = np.arange(n_keys) > np.arange(length)[:, None] + (n_keys - length)
        scores[..., later] = -np.inf
    elif mask is not None and mask.dtype == mx.bool_:
        scores = np.where(np.asarray(mask), scores, np.finfo(np.float32).min)
    elif mask is not None:
        scores += _floats(mask)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = scores.reshape(batch, n_groups, -1, n_keys) @ _floats(values)
    return to_mlx(mixed.reshape(batch, heads, length, -1)).astype(queries.dtype)


def to_mlx(array: np.ndarray) -> mx.array:
    # mx.array of a numpy array loses a Ctrl-C that comes meanwhile, a memoryview does not
    return mx.array(memoryview(array))  # type: ignore[arg-type]


def slot_products(rows: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Rows in clusters (C, n, D), maybe by columns, times states (k, D) float32 → (k, C, n)."""
    if rows.flags.c_contiguous:
        return (states @ rows.reshape(-1, rows.shape[-1]).T).reshape(-1, *rows.shape[:2])
    products = np.matmul(states[None], rows.swapaxes(1, 2))  # (C, k, n)
    return np.ascontiguousarray(products.swapaxes(0, 1))
