"""Rows as a kernel takes them: its inputs, and the expression over them."""

from typing import cast

from .dense_kernels import Version, dense_kernel
from .matrix import Matrix


class StoredRows:
    """Stored rows for a kernel.

    Args:
        stored: The rows.
        n_rows: The number of rows whose product has the same order of sums.
        version: Of the MLX that makes it; None: the installed one.

    Attributes:
        kernel: MLX's own kernel for one state and these rows.
        inputs: Names of the kernel's inputs, with spaces between them.
        arrays: The inputs. They end with a bias, if there is one.
        sizes: Template arguments, by name.
        names: Names of those that the expression has.
        expression: Makes the rows of the inputs.
        files: Files of metal/flash_head/ that the expression needs.
    """

    def __init__(self, stored: Matrix, n_rows: int, version: Version | None = None):
        maker = cast(str, stored.format.metal)
        names = stored.format.arrays
        self.kernel = dense_kernel(stored, n_rows, version)
        self.inputs = " ".join(names)
        self.arrays = list(stored.arrays().values())
        self.sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            # MLX's qmv_quad takes more: then only the order of the sums is another one.
            self.sizes["WORDS"] = max(1, self.kernel.packs)
        self.names = " ".join(name for name in self.sizes if name in maker)
        self.expression = f"flash_head::{maker}({', '.join(names)})"
        self.files = f"{maker.partition('_rows')[0]} dot"
