"""How the Metal kernels read stored rows, and where MLX's own products take their place."""

import re

from .clustered import ClusteredRows
from .matrix import Matrix

LANES = 32

# Positions from which MLX multiplies quantized matrices by its matrix kernels, for at most 2,048
# columns and rows, at most 4,096, and more, by generation of the GPU; of those in a Max or Ultra.
# Source: get_qmv_batch_limit in mlx/backend/metal/quantized.cpp (0.32).
MATRIX_FROM = ((17, (33, 25, 13)), (15, (13, 15, 13)), (13, (14, 10, 6)), (0, (18, 12, 10)))
MATRIX_FROM_ULTRA = (32, 18, 12)


def matrix_from(hidden_size: int, n_rows: int, architecture: str) -> int:
    """Positions from which MLX takes its matrix kernels instead of the vector ones.

    Args:
        hidden_size: Columns D of the matrix.
        n_rows: Its rows.
        architecture: The name from ``mx.device_info``, such as "applegpu_g15s". Others occur in
            tests only and count as the newest.
    """
    size = max(hidden_size, n_rows)
    column = 0 if size <= 2048 else 1 if size <= 4096 else 2
    found = re.fullmatch(r"applegpu_g(\d+)(\w)", architecture)
    generation, kind = (int(found[1]), found[2]) if found else (MATRIX_FROM[0][0], "")
    if kind == "d":
        return MATRIX_FROM_ULTRA[column]
    return next(limits[column] for since, limits in MATRIX_FROM if generation >= since)


def unread(clustered: ClusteredRows) -> dict[str, str]:
    """The steps for which no kernel reads the rows, with the format of these rows.

    The other steps stay kernels.
    """
    found = {"route": clustered.centroids.matrix.format, "score": clustered.rows.format}
    return {step: str(form) for step, form in found.items() if form.metal is None}


def _words(hidden_size: int, bits: int, n_rows: int) -> int:
    """Words of 32 bits that a lane takes at once, as in MLX's matrix-vector product with the rows.

    Source: qmv in mlx/backend/metal/quantized.cpp, which is "fast" with two.
    """
    return 2 if hidden_size % (2 * LANES * 32 // bits) == 0 and n_rows % 8 == 0 else 1


class StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them.

    Args:
        stored: The rows, of a format that the kernels read.
        n_rows: Rows of the matrix whose product by MLX's own kernel has the same sums.
    """

    def __init__(self, stored: Matrix, n_rows: int):
        maker = stored.format.metal
        if maker is None:
            raise ValueError(f"The Metal kernels do not read {stored.format} rows.")
        self.names = list(stored.format.arrays)
        self.arrays = [stored.arrays()[name] for name in self.names]
        sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            sizes["WORDS"] = _words(stored.hidden_size, stored.bits, n_rows)
        self.template = [(name, size) for name, size in sizes.items() if name in maker]
        self.expression = f"flash_head::{maker}({', '.join(self.names)})"
        self.files = (maker.partition("_rows")[0], "dot")
