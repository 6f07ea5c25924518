"""MLX's own kernels for one state, from the text that the installed MLX brings, on the emulator."""

import re
from functools import cache
from pathlib import Path

import mlx.core as mx

from mlx_flashhead.head.dense_kernels import dense_kernel
from mlx_flashhead.head.matrix import Matrix

FOLDER = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
LANES = 32
PRELUDE = """
#define MLX_MTL_CONST static constant constexpr const
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define METAL_FUNC inline
MLX_MTL_CONST int SIMD_SIZE = 32;
template <typename T> using uniform = T;
template <typename T> constexpr T make_uniform(T value) { return value; }
"""
QMV = """
{name}<T, {constants}>(
    weight, scales, {offsets}, hidden, logits, n_columns, n_rows, threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
GEMV = """
threadgroup float unused[1];
GEMVKernel<T, 8, 1, 1, 32, 4, 4, false>::run(
    weight, hidden, hidden, logits, n_columns, n_rows, n_columns, zero, zero, n_columns, unused,
    threadgroup_position_in_grid, thread_position_in_threadgroup, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
"""


@cache
def parts(file: str, *names: str) -> str:
    """The functions and structs of these names, each with its template line."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    begin = r"^(template <[^{};]*>\n)?(static |constant |inline |METAL_FUNC |struct )"
    found = []
    for name in names:
        # Each ends at the margin.
        rest = rf"[^{{}};]*\b{name}\b[^{{}};]*\{{.*?^\}};?$"
        found.append(re.search(begin + rest, text, re.MULTILINE | re.DOTALL)[0])
    text = re.sub(r" \[\[[a-z_]+(\(\d+\))?\]\]", "", "\n".join(found))
    # Metal converts it to bfloat, the emulator only from float.
    half = "this->operator float16_t()"
    return text.replace(f"static_cast<bfloat16_t>({half})", f"bfloat16_t(float({half}))")


def mlx_logits(matrix: Matrix, hidden: mx.array) -> mx.array:
    """The product with one state, (1, D) → (1, V), as the installed MLX makes it on a GPU.

    To be called while the emulator is installed, without checks: where the last rows do not fill
    a tile, two simdgroups write them alike. Source: dispatch_qmv and gemv_axbpy in MLX's
    quantized.cpp and matmul.cpp. Not for D of 64 and 128, which have kernels of their own.
    """
    n_rows = matrix.n_rows
    hidden_size = matrix.hidden_size
    inputs = {"hidden": hidden} | {n: matrix.arrays()[n] for n in matrix.format.arrays}
    inputs |= {"n_columns": hidden_size, "n_rows": n_rows}
    if not matrix.quantized:
        inputs |= {"zero": 0.0}
        header = PRELUDE + parts("gemv.h", "DefaultAccT", "GEMVKernel")
        body = GEMV
        header = header.replace("[[threadgroup(0)]]", "")
        rows = 32
        threadgroup = (LANES, 1, 8)
        # Fewer rows have fewer simdgroups.
        assert n_rows >= 4096
    else:
        kernel = dense_kernel(matrix, n_rows)
        affine = matrix.biases is not None
        name = f"{kernel.name}_impl"
        if not affine:
            name = f"fp_{name}"
        partial = kernel.name == "qmv_fast" and n_rows % 8 > 0
        helpers = ("get_pack_factor", "get_bytes_per_pack", "load_vector", "load_vector_safe")
        if affine:
            header = parts("quantized.h", *helpers, "qdot", "qdot_safe", name)
        else:
            scales = ("dequantize_scale", "Dequantize", "qdot", "qdot_safe", name)
            header = parts("fp4.h", "fp4_e2m1") + parts("fp8.h", "fp8_e4m3", "fp8_e8m0")
            header += "constant constexpr float F8E4M3_MAX = 448.0f;\n"
            header += "constant constexpr float F4E2M1_MAX = 6.0f;\n"
            header += parts("fp_quantized.h", *helpers, *scales)
        constants = f"{matrix.group_size}, {matrix.bits}"
        if partial:
            constants += ", true"
        offsets = "biases" if affine else "(const device float*)nullptr"
        body = QMV.format(name=name, constants=constants, offsets=offsets)
        header = PRELUDE + header
        rows = 8
        threadgroup = (LANES, 2, 1)
    names = {"input_names": list(inputs), "output_names": ["logits"]}
    kernel = mx.fast.metal_kernel(name="mlx_logits", header=header, source=body, **names)
    groups = -(-n_rows // rows)
    x, y, z = threadgroup
    if matrix.quantized:
        grid = (x, y * groups, z)
    else:
        grid = (x * groups, y, z)
    (logits,) = kernel(
        inputs=list(inputs.values()),
        template=[("T", hidden.dtype)],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[(1, n_rows)],
        output_dtypes=[hidden.dtype],
    )
    return logits
