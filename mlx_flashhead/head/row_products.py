"""Products of several states with a layer's quantized rows, each with the bits of a single one.

MLX multiplies several states by kernels that add in another order than the one for a single state.
Here the states share the reading of the weights, and nothing else. Which way does so is found once
for each form of a layer, by trial on this device: FlashHead's own kernel
(``metal/flash_head/rows.h``), or operations of MLX that run its kernel for a single state.

A CPU multiplies state by state in any case. Source: ``_qmm_t`` in mlx/backend/cpu/quantized.cpp.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from textwrap import shorten
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .backend import gpu_is_default
from .dense_kernels import dense_kernel, pack_columns
from .kernel_inputs import SHORTEST, long_enough
from .kernel_texts import LANES, ROUTE_SIMDGROUPS, ROWS, KernelText
from .kernels import make_kernel
from .matrix import AFFINE, Matrix
from .stored_rows import StoredRows

NAME = "row_products"
MAX_STATES = 8
# States that MLX's kernels for single states take at once on every GPU.
# Source: get_qmv_batch_limit in mlx/backend/metal/quantized.cpp.
WHOLE_STATES = 5
# Registers of unpacked weights that a thread keeps beside the sums of more than 4 states, at most.
UNPACKED = 32

# The trial: so many rows of a layer, of which so many differ.
TRIED_ROWS = 4096
OTHER_ROWS = 61
# The spread of the states' values, in powers of e: so sums of two or three have to be rounded.
SPREAD = 6.0

BODY = """
flash_head::row_products<D, H, AT_ONCE, BIASED, PRODUCT>(
    {rows}, hidden, bias, products, weight_shape[0], threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""

# States (…, K) and rows (N, K) → (…, N).
Way = Callable[[mx.array, Matrix], mx.array]

log = logging.getLogger("mlx_flashhead")


class Form(NamedTuple):
    """What decides which kernels MLX and FlashHead take, and so the outcome of a trial.

    Attributes:
        n_states: The number of states.
        dtype: The states' dtype.
        scales: The scales' dtype.
        bias: The bias's dtype; None without one.
        mode: MLX's mode of quantization.
        bits: Bits of a weight.
        group_size: Columns that share a scale.
        n_rows: Like the layer's: at most TRIED_ROWS, and what is left of a block of 8.
        n_columns: The layer's.
    """

    n_states: int
    dtype: mx.Dtype
    scales: mx.Dtype
    bias: mx.Dtype | None
    mode: str
    bits: int
    group_size: int
    n_rows: int
    n_columns: int

    def __str__(self) -> str:
        dtype = str(self.dtype).rpartition(".")[2]
        states = f"{self.n_states} states of {self.n_columns} {dtype}"
        return f"{states} and {self.bits}-bit {self.mode} rows"


# The ways that were found in this process.
_ways: dict[Form, Way | None] = {}


def row_products(x: mx.array, layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> mx.array | None:
    """What the layer gives for each of T states alone, as :func:`products_of_each`.

    Args:
        x: The states (..., K).
        layer: A quantized layer of K columns. An embedding is the layer that `as_linear` computes.
    """
    rows = Matrix(
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        layer.get("bias"),
        layer.group_size,
        layer.bits,
        layer.mode,
    )
    return products_of_each(x, rows)


def products_of_each(x: mx.array, rows: Matrix) -> mx.array | None:
    """The products of each of T states alone with rows, to the last bit. Lazy.

    Only the first call for a form of rows evaluates: it compiles and tries the ways, on arrays of
    its own.

    Args:
        x: (..., K), T states in all: float32, float16 or bfloat16.
        rows: Quantized, (N, K).

    Returns:
        (..., N); None if no way has the bits of single products, or if T is above 8.
    """
    n_states = x.size // x.shape[-1]
    if n_states == 1 or not gpu_is_default():
        return rows.matmul(x)
    if n_states > MAX_STATES:
        return None
    form = _form(x, n_states, rows)
    if form not in _ways:
        _ways[form] = _find_way(form)
    way = _ways[form]
    if way is None:
        return None
    return way(x, rows)


def _form(x: mx.array, n_states: int, rows: Matrix) -> Form:
    n_rows = rows.weight.shape[0]
    scales = cast(mx.array, rows.scales)
    bias = None
    if rows.bias is not None:
        bias = rows.bias.dtype
    return Form(
        n_states=n_states,
        dtype=x.dtype,
        scales=scales.dtype,
        bias=bias,
        mode=rows.mode,
        bits=rows.bits,
        group_size=rows.group_size,
        n_rows=min(n_rows, TRIED_ROWS + n_rows % 8),
        n_columns=x.shape[-1],
    )


def _find_way(form: Form) -> Way | None:
    """The first way with the bits of single products, or None. Evaluates."""
    rows = _tried_rows(form)
    states = _tried_states(form)
    expected = [_bits(rows.matmul(states[i : i + 1])) for i in range(form.n_states)]
    for name, way in _ways_of(form, rows):
        try:
            found = _bits(way(states, rows))
            if mx.array_equal(found, mx.concatenate(expected)).item():
                return way
            trouble = "adds in another order than MLX's own for one state"
        # MLX raises this for a text that does not compile, a rejected pipeline, a lost device.
        except (RuntimeError, ValueError) as error:
            reason = shorten(str(error), 300, placeholder=" ...").rstrip(".")
            trouble = f"does not run on this device ({reason})"
        log.warning(f"For {form} {name} {trouble}: it is not used.")
    return None


def _ways_of(form: Form, rows: Matrix) -> Iterator[tuple[str, Way]]:
    """Names of the ways, and how each multiplies; the best one first."""
    if not dense_kernel(rows, form.n_rows).scored:
        yield "MLX's kernel for narrow rows", _at_once
    elif rows.format.metal is not None and cast(mx.array, rows.scales).size >= SHORTEST:
        yield "FlashHead's kernel", _Kernel(form, rows)
    yield "MLX's gather_qmm", _gathered


class _Kernel:
    """The kernel for a form."""

    def __init__(self, form: Form, rows: Matrix):
        stored = StoredRows(rows, form.n_rows)
        expression = stored.expression
        # The compiler may unpack a row's weights once for all states, which takes registers.
        n_registers = ROWS * stored.kernel.packs * pack_columns(rows.bits)
        if rows.mode == AFFINE and rows.bits == 4:
            expression = f"flash_head::half_rows({expression})"
            n_registers //= 2
        self._at_once = ROWS
        if form.n_states > ROWS and n_registers > UNPACKED:
            self._at_once = ROWS // 2
        self._arrays = rows.format.arrays
        self._dtype = rows.logits_dtype(form.dtype)
        text = KernelText(
            f"hidden {stored.inputs} bias",
            "products",
            BODY.format(rows=expression),
            files=f"{stored.files} rows",
            sizes="",
            threads=LANES * ROUTE_SIMDGROUPS,
        )
        self._launch = make_kernel(NAME, text, {}, mx.fast.metal_kernel)
        product = rows.product_dtype(form.dtype)
        self._template: dict[str, Any] = {
            "D": form.n_columns,
            "H": form.n_states,
            "AT_ONCE": self._at_once,
            "BIASED": form.bias is not None,
            "PRODUCT": product,
        }
        for name in stored.names.split():
            self._template[name] = stored.sizes[name]
        if rows.biases is not None:
            self._template["SUM"] = mx.float32
            if stored.kernel.added > 1:
                self._template["SUM"] = product

    def __call__(self, x: mx.array, rows: Matrix) -> mx.array:
        n_rows = rows.n_rows
        groups = -(-n_rows // (self._at_once * ROUTE_SIMDGROUPS))
        # Without a bias it is any array, which is not read.
        bias = x
        if rows.bias is not None:
            bias = long_enough(rows.bias)
        stored = [getattr(rows, name) for name in self._arrays]
        result = (*x.shape[:-1], n_rows), self._dtype
        (products,) = self._launch([x, *stored, bias], groups, 1, result, **self._template)
        return products


def _at_once(x: mx.array, rows: Matrix) -> mx.array:
    """MLX's product of all states, by its kernel for one where it has no other for a few."""
    states = x.reshape(-1, x.shape[-1])
    starts = range(0, len(states), WHOLE_STATES)
    parts = [rows.matmul(states[start : start + WHOLE_STATES]) for start in starts]
    return mx.concatenate(parts).reshape(*x.shape[:-1], -1)


def _gathered(x: mx.array, rows: Matrix) -> mx.array:
    """MLX's product of states and experts, with one expert: by its kernel for one state.

    It reads the rows once for each state, most of them from caches.
    """
    states = x.reshape(-1, 1, x.shape[-1])
    n_states = len(states)
    expert = rows.map(lambda array: array[None])
    products = mx.gather_qmm(
        states,
        expert.weight,
        cast(mx.array, expert.scales),
        expert.biases,
        lhs_indices=_indices(n_states, 1),
        rhs_indices=_indices(n_states, 0),
        transpose=True,
        **rows.quantization,
    )
    products = products.reshape(*x.shape[:-1], -1)
    if rows.bias is not None:
        products = products + rows.bias
    return products


@cache
def _indices(n_states: int, stride: int) -> mx.array:
    """``n_states`` indices, ``stride`` apart."""
    return mx.array([stride * i for i in range(n_states)], mx.uint32)


def _bits(array: mx.array) -> mx.array:
    """The bits of floats."""
    if array.itemsize == 4:
        return array.view(mx.uint32)
    return array.view(mx.uint16)


def _tried_rows(form: Form) -> Matrix:
    """Rows like the layer's, of which the second half has the groups of the first in another order.

    The products with every other state of `_tried_states` are 0, but for the errors of their sums.
    So another order of sums shows in nearly all of them, where it would show in one of 10,000
    random products in bfloat16.
    """
    dtype = form.scales
    if form.scales == mx.uint8:
        dtype = form.dtype
    groups = mx.random.normal(_groups(form, OTHER_ROWS), key=mx.random.key(0))
    weight = _repeated(groups).reshape(OTHER_ROWS, -1).astype(dtype)
    rows = Matrix(weight).quantize(bits=form.bits, group_size=form.group_size, mode=form.mode)
    ids = mx.arange(form.n_rows) % OTHER_ROWS
    if form.bias is None:
        return rows.take(ids)
    bias = mx.random.normal((OTHER_ROWS,), scale=16, key=mx.random.key(1))
    # Every other row has none, which leaves half of the errors.
    bias = mx.where(mx.arange(OTHER_ROWS) % 2 == 0, 0, bias)
    return replace(rows, bias=bias.astype(form.bias)).take(ids)


def _tried_states(form: Form) -> mx.array:
    """States (T, K) for `_tried_rows`."""
    shape = _groups(form, form.n_states)
    n_half = shape[1] // 2
    # The second half of the groups cancels the first. One that is left counts nothing.
    signs = np.zeros(shape[1], np.float32)
    signs[:n_half] = 1
    signs[n_half : 2 * n_half] = -1
    values = mx.random.normal(shape, key=mx.random.key(2))
    exponents = mx.random.uniform(-SPREAD, SPREAD, shape, key=mx.random.key(4))
    cancelling = _repeated(values * mx.exp(exponents)) * mx.array(signs)[:, None]
    cancels = mx.arange(form.n_states)[:, None, None] % 2 == 0
    states = mx.where(cancels, cancelling, values)
    return states.reshape(form.n_states, -1).astype(form.dtype)


def _groups(form: Form, n: int) -> tuple[int, int, int]:
    """The shape of the groups of ``n`` rows or states."""
    return n, form.n_columns // form.group_size, form.group_size


def _repeated(groups: mx.array) -> mx.array:
    """The groups (n, G, …), of which the second half are those of the first in another order."""
    half = groups.shape[1] // 2
    if half == 0:
        return groups
    first = groups[:, :half]
    last = groups[:, 2 * half :]
    order = mx.random.permutation(half, key=mx.random.key(3))
    return mx.concatenate([first, first[:, order], last], axis=1)
