"""The dense product of several states at once, which reads each row once for all of them."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..head.flash_head import FlashHead
from ..models.cpu_products import numpy_is_faster, slot_products, to_mlx

WORTH_A_THREAD = 10_000_000  # multiply-adds, a millisecond of work


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n): lazy, or computed by a
    thread beside the steps of the model, on a CPU whose BLAS numpy beats."""

    def __init__(self, head: FlashHead, hidden: mx.array):
        self._head, self._hidden = head, hidden
        self._future: Future[np.ndarray] | None = None
        rows = head.clustered.rows
        by_numpy = rows.weight.dtype == mx.float32 and numpy_is_faster()
        if by_numpy and len(hidden) * rows.weight.size >= WORTH_A_THREAD:
            states = np.asarray(hidden.astype(mx.float32))
            self._future = _worker().submit(slot_products, np.asarray(rows.weight), states)

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> mx.array:
        """The logits, lazy or computed."""
        if self._future is None:
            return self._head.slot_logits(self._hidden)
        logits = to_mlx(self._future.result())
        bias = self._head.clustered.rows.bias
        return logits if bias is None else logits + bias


@lru_cache(maxsize=1)
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "check")
