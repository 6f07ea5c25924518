"""A stored matrix, dense or quantized: the table of formats, and its operations."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

# The arrays of rows, in the order in which MLX and the kernels take them.
ARRAYS = ("weight", "scales", "biases")
FLOATS = None
AFFINE = "affine"
GROUPS = (32, 64, 128)
# MLX's own default.
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Format:
    """A format of rows: floats, or one of MLX's quantizations.

    Attributes:
        mode: MLX's quantization mode; None for floats.
        bits: Bits per weight, without scales.
        group_sizes: Columns that may share a scale; empty for floats.
        arrays: Names of the arrays, in the order in which MLX and the kernels take them.
        metal: The kernels' function that makes rows of the arrays; None if they do not read them.
    """

    mode: str | None
    bits: int
    group_sizes: tuple[int, ...]
    arrays: tuple[str, ...]
    metal: str | None

    def __str__(self) -> str:
        """Says the format in words before "rows": "16-bit float", "3-bit affine", "nvfp4"."""
        if self.mode in (FLOATS, AFFINE):
            return f"{self.bits}-bit {self.mode or 'float'}"
        return self.mode


AFFINE_ROWS = "affine_rows<D, BITS, GROUP, WORDS, SUM>"
FP_ROWS = "fp_rows<D, BITS, GROUP, WORDS>"

# Source: the table of modes in the documentation of mlx.core.quantize (0.32).
FORMATS = (
    Format(FLOATS, 32, (), ARRAYS[:1], "dense_rows<D>"),
    Format(FLOATS, 16, (), ARRAYS[:1], "dense_rows<D>"),
    Format(AFFINE, 8, GROUPS, ARRAYS, AFFINE_ROWS),
    Format(AFFINE, 6, GROUPS, ARRAYS, AFFINE_ROWS),
    Format(AFFINE, 5, GROUPS, ARRAYS, AFFINE_ROWS),
    Format(AFFINE, 4, GROUPS, ARRAYS, AFFINE_ROWS),
    Format(AFFINE, 3, GROUPS, ARRAYS, None),
    Format(AFFINE, 2, GROUPS, ARRAYS, None),
    Format(AFFINE, 1, GROUPS, ARRAYS, None),
    Format("mxfp8", 8, (32,), ARRAYS[:2], FP_ROWS),
    Format("mxfp4", 4, (32,), ARRAYS[:2], FP_ROWS),
    Format("nvfp4", 4, (16,), ARRAYS[:2], FP_ROWS),
)


def affine_group(width: int, first: int = DEFAULT_GROUP) -> int | None:
    """The group for affine rows of ``width`` columns: ``first``, else 32; None if neither fits."""
    for size in (first, min(GROUPS)):
        if width % size == 0:
            return size
    return None


@dataclass(frozen=True)
class Matrix:
    """A matrix (V, D) as a model stores it; in cluster order it is (C, cluster_size, D).

    Attributes:
        weight: (V, D) float32, float16 or bfloat16; (V, D·bits/32) uint32 when quantized.
        scales: (V, D/group_size), floats or uint8 by mode.
        biases: (V, D/group_size), the quantization offsets of affine rows.
        bias: (V,), added to the products.
        group_size: Columns that share a scale; 0 when not quantized.
        bits: Bits per weight; 0 when not quantized.
        mode: MLX's quantization mode, as the table of formats has it.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None
    group_size: int = 0
    bits: int = 0
    mode: str = AFFINE

    @property
    def quantized(self) -> bool:
        """Whether the rows are quantized."""
        return self.scales is not None

    @property
    def format(self) -> Format:
        """The entry of the table of formats.

        Raises:
            ValueError: If the table has none.
        """
        mode = None
        bits = 8 * self.weight.itemsize
        if self.quantized:
            mode = self.mode
            bits = self.bits
        for known in FORMATS:
            if known.mode == mode and known.bits == bits:
                return known
        raise ValueError(
            f"Rows of the format '{bits}-bit {mode or 'float'}' are not supported: the formats are "
            f"{', '.join(map(str, FORMATS))}."
        )

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """The number of columns D, whatever the bits of a weight."""
        width = self.weight.shape[-1]
        if self.quantized:
            return width * 32 // self.bits
        return width

    @property
    def nbytes(self) -> int:
        """The bytes of all of its arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def quantization(self) -> dict[str, Any]:
        """Keywords of ``mx.quantized_matmul`` and similar functions; empty when not quantized."""
        if not self.quantized:
            return {}
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def arrays(self) -> dict[str, mx.array]:
        """The arrays present, by their parameter names (weight, scales, biases, bias)."""
        named = {name: getattr(self, name) for name in (*ARRAYS, "bias")}
        return {name: array for name, array in named.items() if array is not None}

    def map(self, function: Callable[[mx.array], mx.array]) -> "Matrix":
        """The same rows with ``function`` applied to each array."""
        changes: dict[str, Any] = {name: function(a) for name, a in self.arrays().items()}
        return replace(self, **changes)

    def take(self, ids: mx.array) -> "Matrix":
        """Rows ``ids`` (integers of any shape). The shape becomes the leading axes. Lazy."""
        return self.map(lambda array: mx.take(array, ids, axis=0))

    def quantize(self, *, bits: int, group_size: int, mode: str = AFFINE) -> "Matrix":
        """Floats in fewer bits, rounded to nearest by MLX. Lazy."""
        made = mx.quantize(self.weight, group_size=group_size, bits=bits, mode=mode)
        rows = replace(self, group_size=group_size, bits=bits, mode=mode, biases=None)
        arrays: dict[str, Any] = dict(zip(ARRAYS, made, strict=False))
        return replace(rows, **arrays)

    def product_dtype(self, hidden_dtype: mx.Dtype) -> mx.Dtype:
        """The dtype of products with hidden states of ``hidden_dtype``, before the bias."""
        values = self.weight
        if self.scales is not None:
            values = self.scales
        # Such scales are powers of two.
        if values.dtype == mx.uint8:
            return hidden_dtype
        return mx.result_type(hidden_dtype, values.dtype)

    def logits_dtype(self, hidden_dtype: mx.Dtype) -> mx.Dtype:
        """The dtype of the dense head's logits for hidden states of ``hidden_dtype``."""
        dtype = self.product_dtype(hidden_dtype)
        if self.bias is not None:
            dtype = mx.result_type(dtype, self.bias.dtype)
        return dtype

    def matmul(self, hidden: mx.array) -> mx.array:
        """Logits of all rows: hidden (..., D) → (..., V)."""
        if self.scales is None:
            columns = self.weight.swapaxes(-1, -2)
            if self.bias is None:
                return hidden @ columns
            # That is what nn.Linear does: a CPU rounds it once.
            return mx.addmm(self.bias, hidden, columns)
        logits = mx.quantized_matmul(
            hidden, self.weight, self.scales, self.biases, transpose=True, **self.quantization
        )
        if self.bias is not None:
            logits = logits + self.bias
        return logits

    def dequantized(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The weight as floats (V, D), of the dense layer's dtype or of ``dtype``, rounded once."""
        if self.scales is None:
            if dtype is None:
                return self.weight
            return self.weight.astype(dtype)
        scales = self.scales
        biases = self.biases
        if dtype is not None and biases is not None:
            # MLX's `dequantize` rounds to the dtype of the scales, which products do not.
            scales = scales.astype(dtype)
            biases = biases.astype(dtype)
        return mx.dequantize(self.weight, scales, biases, **self.quantization, dtype=dtype)

    def in_float16(self) -> "Matrix | None":
        """Returns the same quantized rows with float16 scales, or None. Evaluates.

        It is None where a value would change, and for floats, which would be stored twice.
        """
        if self.biases is None:
            return None
        rounded: dict[str, Any] = {}
        for name, array in self.arrays().items():
            if array.dtype == mx.uint32:
                continue
            rounded[name] = array.astype(mx.float16)
            if not mx.array_equal(rounded[name].astype(array.dtype), array):
                return None
        return replace(self, **rounded)

    def sample(self) -> "Matrix":
        """64 evenly spaced rows, which identify the rows without reading them all. Lazy."""
        ids = np.linspace(0, self.n_rows - 1, 64).astype(np.uint32)
        return self.take(mx.array(ids))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the sample as stored, the dtypes and the shapes."""
        digest = hashlib.sha256()
        sample = self.sample().arrays()
        for name, array in self.arrays().items():
            if name != "bias":
                digest.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
                digest.update(bytes(sample[name].view(mx.uint8)))
        return digest.hexdigest()


def as_float32(array: np.ndarray | mx.array) -> np.ndarray:
    """The array as numpy float32, from any float dtype (numpy has no bfloat16)."""
    if isinstance(array, mx.array):
        array = array.astype(mx.float32)
    return np.asarray(array, np.float32)


def to_mlx(array: np.ndarray) -> mx.array:
    """An array of numpy as one of MLX."""
    # Of a numpy array itself `mx.array` loses a Ctrl-C that comes meanwhile.
    return mx.array(memoryview(array))  # type: ignore[arg-type]
