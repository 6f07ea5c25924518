"""How the Metal kernels read stored rows, and where MLX's own products take their place."""

from .clustered import ClusteredRows
from .matrix import Matrix

LANES = 32


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
