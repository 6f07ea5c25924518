"""Products of a model's layers by numpy, for CPUs on which MLX's own are slow (docs/how-it-
works.md). Each is evaluated at once, which pays for prompts and batches."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .compat.patching import replaced

METHODS = (
    (nn.Linear, "__call__"),
    (nn.QuantizedLinear, "__call__"),
    (nn.Embedding, "as_linear"),
    (nn.QuantizedEmbedding, "as_linear"),
)


def numpy_is_faster() -> bool:
    """Whether MLX computes on a CPU without Apple's Accelerate."""
    return mx.default_device().type == mx.cpu and sys.platform != "darwin"


@contextmanager
def numpy_products(lazy: nn.Module | None = None) -> Iterator[None]:
    """Within the block, linear layers and embeddings as heads multiply by numpy if it is faster,
    but for the layer ``lazy``, whose product may never be needed."""
    if not numpy_is_faster():
        yield
        return

    def by_numpy(original):
        def call(self, x):
            return original(self, x) if self is lazy else _product(self, x)

        return call

    attention = mx.fast.scaled_dot_product_attention

    def attention_by_numpy(queries, keys, values, *, scale, mask=None, **others):
        if others.get("sinks") is not None:
            return attention(queries, keys, values, scale=scale, mask=mask, **others)
        return _attention(queries, keys, values, scale, mask)

    with ExitStack() as stack:
        for cls, name in METHODS:
            stack.enter_context(replaced(cls, **{name: by_numpy(getattr(cls, name))}))
        stack.enter_context(replaced(mx.fast, scaled_dot_product_attention=attention_by_numpy))
        yield


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    """The layer's rows times x: (…, D) → (…, V) of the dtype of x."""
    weight = layer.weight
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        weight = mx.dequantize(
            weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
        )
    # float32 arrays are views of MLX's memory
    matrix = np.asarray(weight.astype(mx.float32))
    states = np.asarray(x.astype(mx.float32))
    product = to_mlx(states.reshape(-1, states.shape[-1]) @ matrix.T)
    product = product.reshape(*x.shape[:-1], len(matrix)).astype(x.dtype)
    return product + layer.bias if "bias" in layer else product


def _attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` by numpy: (B, H, L, D) → (B, H, L, D_v)."""
    batch, heads, length, _ = queries.shape
    groups = keys.shape[1]
    asked, given, held = (np.asarray(a.astype(mx.float32)) for a in (queries, keys, values))
    asked = (asked * np.float32(scale)).reshape(batch, groups, -1, asked.shape[-1])
    scores = asked @ given.swapaxes(-1, -2)  # (B, groups, H / groups * L, S)
    scores = scores.reshape(batch, heads, length, -1)
    if isinstance(mask, str):  # "causal"
        later = np.arange(scores.shape[-1]) > np.arange(length)[:, None] + (
            scores.shape[-1] - length
        )
        scores[..., later] = -np.inf
    elif mask is not None and mask.dtype == mx.bool_:
        scores = np.where(np.asarray(mask), scores, np.finfo(np.float32).min)
    elif mask is not None:
        scores += np.asarray(mask.astype(mx.float32))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = scores.reshape(batch, groups, -1, scores.shape[-1]) @ held
    return to_mlx(mixed.reshape(batch, heads, length, -1)).astype(queries.dtype)


def to_mlx(array: np.ndarray) -> mx.array:
    """The array as MLX's."""
    # mx.array of a numpy array loses a Ctrl-C that comes meanwhile, a memoryview does not
    return mx.array(memoryview(array))  # type: ignore[arg-type]


def slot_products(rows: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Rows in clusters (C, n, D), maybe by columns, times states (k, D) float32 → (k, C, n)."""
    if rows.flags.c_contiguous:
        return (states @ rows.reshape(-1, rows.shape[-1]).T).reshape(-1, *rows.shape[:2])
    products = np.matmul(states[None], rows.swapaxes(1, 2))  # (C, k, n)
    return np.ascontiguousarray(products.swapaxes(0, 1))
