"""The product of all rows with the states of several proposals, in the order of the clusters.

Each row is read once for all states. Its numbers are not those that each state has alone:
head/rounding.py says how far they may lie apart.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from .backend import numpy_is_faster
from .matrix import as_float32, to_mlx
from .operations import PortableOperations

# Sizes of a product: of up to so many states the kernels and the rounding are the same.
CLASSES = (1, 2, 4, 8, 16, 32)
# So many multiply-adds are a millisecond of work.
WORTH_A_THREAD = 10_000_000

# Its thread begins with the first product.
_worker = ThreadPoolExecutor(1, "verification")

# States (R, D), and a row of them.
Source = tuple[mx.array, int]


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n).

    They are lazy. On a CPU where numpy is faster than MLX's BLAS, a thread computes them beside the
    steps of the model.

    Args:
        operations: Of the head whose rows are multiplied.
        hidden: (k, D), the states.
        sources: For each state an array that has been computed already, and a row of it. A thread
            takes them from there, since ``hidden`` may wait for the step that is running.
    """

    def __init__(
        self,
        operations: PortableOperations,
        hidden: mx.array,
        sources: Sequence[Source] | None = None,
    ):
        self._operations = operations
        self._k = len(hidden)
        self._future: Future[np.ndarray] | None = None
        rows = operations.clustered.rows
        by_numpy = rows.weight.dtype == mx.float32 and numpy_is_faster()
        if by_numpy and self._k * rows.weight.size >= WORTH_A_THREAD:
            if sources is None:
                states = as_float32(hidden)
            else:
                states = np.stack([as_float32(each)[row] for each, row in sources])
            self._future = _worker.submit(_product, np.asarray(rows.weight), states)
        missing = product_size(self._k) - self._k
        if missing:
            hidden = mx.pad(hidden, [(0, missing), (0, 0)])
        self._hidden = hidden

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> mx.array:
        """Returns the logits (k, C, n), after waiting for the thread if there is one."""
        if self._future is None:
            return self._operations.verifying_product(self._hidden)[: self._k]
        logits = to_mlx(self._future.result())
        bias = self._operations.clustered.rows.bias
        if bias is not None:
            logits = logits + bias
        return logits


def product_size(k: int) -> int:
    """Returns the size to which a product of ``k`` states is filled up.

    Its kernel is then the one whose rounding is known. A CPU has one for all sizes.
    """
    if mx.default_device().type == mx.cpu:
        return k
    for size in CLASSES:
        if size >= k:
            return size
    largest = CLASSES[-1]
    return -(-k // largest) * largest


def _product(rows: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Multiplies rows in clusters with states by numpy.

    Args:
        rows: Rows (C, n, D) float32, in memory by rows or by columns.
        states: States (k, D) float32.

    Returns:
        The products (k, C, n).
    """
    if rows.flags.c_contiguous:
        flat_rows = rows.reshape(-1, rows.shape[-1])
        flat: np.ndarray = np.matmul(states, flat_rows.T)
        return flat.reshape(-1, *rows.shape[:2])
    # These are (C, k, n).
    products = np.matmul(states[None], rows.swapaxes(1, 2))
    return np.ascontiguousarray(products.swapaxes(0, 1))
