"""Which of MLX's Metal kernels multiplies one state by a head's rows, by MLX's version.

A doubt is decided by the sums that mlx-lm's own head would make, and the kernel that scores rows
adds in the order of MLX's. Both rest on this table for rows (V, D) in few bits. A block is 32 lanes
times two packs of columns (times one pack for 1 and 2 bits).

| MLX              | D is 64 or 128; 1, 2, 4, 8 bits | D is whole blocks            | others |
|------------------|---------------------------------|------------------------------|--------|
| up to 0.32.0     | qmv_quad                        | of 512, as 0.32.1            | qmv    |
| 0.32.1 to 0.32.3 | qmv_quad                        | V % 8 == 0: qmv_fast, or qmv | qmv    |
| 0.32.4           | qmv_quad                        | qmv_fast                     | qmv    |

For 1 bit MLX asks for 2,048 columns, twice the block. qmv_fast gives a lane two packs at once, qmv
one. Affine rows need the sum of the hidden values that
share an offset: up to 0.32.3 four of them (eight for 3 and 5 bits, one for 8) are added in the
dtype of the product, from 0.32.4 on in float32 (but for 1 bit, which is new). Floats are multiplied
by gemv in all versions, in another order where there are fewer than D / 16 rows, which no
vocabulary is known to have.

Python's MLX is 0.32.1 or later. A program in Swift has an older one (`head/plan.py`).

Source: MLX's mlx/backend/metal in 0.32.1: `qmv` and `qmv_fast_k_alignment` (quantized.cpp, lines
    484 and 147), `dispatch_qmv` there, `gemv_axbpy` (matmul.cpp); kernels/
    quantized.h, `load_vector` (line 28), `qmv_fast_impl` and `qmv_impl` in 0.32.1 to 0.32.4;
    kernels/fp_quantized.h. In 0.31.1 (ce45c525): `qmv` (quantized.cpp, line 259) and `load_vector`
    in kernels/quantized.h. For 0.32.3 and 0.32.4 the names of kernels in the wheel's library.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as version_of

from .matrix import Matrix

# A version of MLX, three numbers.
Version = tuple[int, ...]

# Threads of a simdgroup, by the name in MLX's kernels.
SIMD_SIZE = 32
# A threadgroup of qmv or qmv_fast takes so many rows.
ROWS_AT_ONCE = 8
# Columns of a pack, by bits, where a pack is not a word of 32 bits.
PACKS = {3: 8, 5: 8, 6: 4}
QUAD_WIDTHS = (64, 128)
QUAD_BITS = (1, 2, 4, 8)
# The first version whose qmv_fast takes any number of rows, and adds hidden values in float32.
ANY_ROWS = (0, 32, 4)
# The first version in which a block depends on the bits: qmv_fast_k_alignment.
BLOCKS_BY_BITS = (0, 32, 1)


@dataclass(frozen=True)
class DenseKernel:
    """How one state is multiplied by rows.

    Attributes:
        name: The name of MLX's kernel, with what changes its order of sums.
        packs: Packs of a row that a lane takes at once; 0 for floats.
        added: Hidden values that are added up in the dtype of the product; 1 where they are added
            in float32, or not at all.
        scored: Whether the kernel that scores rows adds in the same order.
    """

    name: str
    packs: int = 0
    added: int = 1
    scored: bool = True


@cache
def mlx_version() -> Version:
    """MLX's version, three numbers."""
    return tuple(int(part) for part in version_of("mlx").split(".")[:3])


def pack_columns(bits: int) -> int:
    """Columns of a row of ``bits`` that MLX's kernels unpack together."""
    return PACKS.get(bits, 32 // bits)


def dense_kernel(rows: Matrix, n_rows: int, version: Version | None = None) -> DenseKernel:
    """The kernel for one state and ``n_rows`` rows of the format and width of ``rows``.

    Args:
        rows: A matrix (…, D).
        n_rows: How many rows are multiplied at once.
        version: MLX's; the installed one if None.
    """
    if version is None:
        version = mlx_version()
    width = rows.hidden_size
    if not rows.quantized:
        if width <= 64:
            return DenseKernel("gemv of 4 lanes", scored=False)
        return DenseKernel("gemv")
    bits = rows.bits
    added = 1
    if rows.biases is not None:
        added = _added(bits, version)
    if width in QUAD_WIDTHS and bits in QUAD_BITS:
        return DenseKernel("qmv_quad", added=added, scored=False)
    packs = 2
    if bits <= 2:
        packs = 1
    takes_rows = version >= ANY_ROWS or n_rows % ROWS_AT_ONCE == 0
    if takes_rows and width % _block(bits, packs, version) == 0:
        return DenseKernel("qmv_fast", packs, added)
    return DenseKernel("qmv", 1, added)


def _block(bits: int, packs: int, version: Version) -> int:
    """The columns of which MLX asks for whole blocks where it takes so many packs at once."""
    if version < BLOCKS_BY_BITS:
        return 512
    block = SIMD_SIZE * packs * pack_columns(bits)
    if bits == 1:
        return 2 * block
    return block


def _added(bits: int, version: Version) -> int:
    """Hidden values that meet the offsets of affine rows as one sum in the product's dtype."""
    if bits == 8:
        return 1
    if bits > 1 and version >= ANY_ROWS:
        return 1
    if bits in (1, 3, 5):
        return 8
    return 4
