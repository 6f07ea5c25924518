"""The formats of a stored matrix: a row each. Those with kernels have a file in
``metal/flash_head/``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    mode: str | None  # MLX's quantization mode; None for floats
    bits: int  # per weight, without scales
    group_sizes: tuple[int, ...]  # columns that may share a scale; empty for floats
    arrays: tuple[str, ...]  # their names, in the order in which MLX and the kernels take them
    group_bytes: int  # of scales and biases per group; those of affine have 16 bits
    # The kernels' function that makes rows of the arrays, with its template arguments; None if the
    # kernels do not read the format.
    metal: str | None

    def bytes_per_weight(self, group_size: int | None = None) -> float:
        """Bytes per weight with its part of the scales, which ``group_size`` columns share."""
        return self.bits / 8 + (self.group_bytes / group_size if group_size else 0)

    def __str__(self) -> str:
        """In words that come before "rows": "16-bit float", "3-bit affine", "nvfp4"."""
        if self.mode in (FLOATS, AFFINE):
            return f"{self.bits}-bit {self.mode or 'float'}"
        return self.mode


FLOATS, AFFINE = None, "affine"
GROUPS = (32, 64, 128)
DENSE_ROWS = "dense_rows<D>"
AFFINE_ROWS, FP_ROWS = "affine_rows<D, BITS, GROUP, WORDS>", "fp_rows<D, BITS, GROUP, WORDS>"
_W, _WS, _WSB = ("weight",), ("weight", "scales"), ("weight", "scales", "biases")

# Source: the table of modes in the documentation of mlx.core.quantize (0.32).
FORMATS = (
    #      mode      bits groups  arrays bytes of a group  in Metal
    Format(FLOATS, 32, (), _W, 0, DENSE_ROWS),
    Format(FLOATS, 16, (), _W, 0, DENSE_ROWS),
    Format(AFFINE, 8, GROUPS, _WSB, 4, AFFINE_ROWS),
    Format(AFFINE, 6, GROUPS, _WSB, 4, AFFINE_ROWS),
    Format(AFFINE, 5, GROUPS, _WSB, 4, AFFINE_ROWS),
    Format(AFFINE, 4, GROUPS, _WSB, 4, AFFINE_ROWS),
    Format(AFFINE, 3, GROUPS, _WSB, 4, None),
    Format(AFFINE, 2, GROUPS, _WSB, 4, None),
    Format(AFFINE, 1, GROUPS, _WSB, 4, None),
    Format("mxfp8", 8, (32,), _WS, 1, FP_ROWS),
    Format("mxfp4", 4, (32,), _WS, 1, FP_ROWS),
    Format("nvfp4", 4, (16,), _WS, 1, FP_ROWS),
)

AFFINE_BITS = (4, 6, 8)  # to which heads and centroids are quantized
DEFAULT_GROUP = 64  # MLX's own default


def find_format(mode: str | None, bits: int) -> Format:
    """The format of a mode (None for floats) and a number of bits, or ValueError."""
    for one in FORMATS:
        if (one.mode, one.bits) == (mode, bits):
            return one
    form = f"{bits}-bit {mode or 'float'}"
    raise ValueError(
        f"Rows of the format {form!r} are not supported: the formats are "
        f"{', '.join(map(str, FORMATS))}."
    )


def affine_group(width: int, first: int = DEFAULT_GROUP) -> int | None:
    """The group for affine rows of ``width`` columns: ``first``, else 32; None if neither fits."""
    return next((size for size in (first, min(GROUPS)) if width % size == 0), None)
