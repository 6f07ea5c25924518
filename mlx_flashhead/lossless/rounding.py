"""The dense product of several states at once, and how far its logits may lie from those of one
state, and these from those of the rows of a few clusters."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..head.flash_head import FlashHead
from ..models.cpu_products import numpy_is_faster, slot_products, to_mlx

WORTH_A_THREAD = 10_000_000  # multiply-adds, a millisecond of work
N_STATES = 4
ULPS = 2  # of the result's dtype: each of two values is rounded to the nearest
SIGMAS = 16  # of a sum's rounding errors, which grow with the root of the number of terms
MEASURED = 4  # times what was measured on a few states

_EPSILON = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
_known: WeakKeyDictionary[FlashHead, "Rounding"] = WeakKeyDictionary()


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
        if self._future is None:
            return self._head.slot_logits(self._hidden)
        logits = to_mlx(self._future.result())
        bias = self._head.clustered.rows.bias
        return logits if bias is None else logits + bias


@lru_cache(maxsize=1)
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "check")


@dataclass(frozen=True)
class Rounding:
    epsilon: float  # spacing of the logits' dtype, relative to a logit
    batch: float  # greatest one of a product of several states, relative to the largest logit
    scored: float  # greatest one of a scored token's logit, likewise; 0 if it is the same number


def rounding_of(head: FlashHead, dtype: mx.Dtype) -> Rounding:
    """The distances for a head and hidden states of ``dtype``, measured once. Evaluates.

    Source: Higham and Mary 2019, "A new approach to probabilistic rounding error analysis", for the
        root of the number of terms.
    """
    if head not in _known:
        _known[head] = _measure(head, dtype)
    return _known[head]


def _measure(head: FlashHead, dtype: mx.Dtype) -> Rounding:
    hidden = mx.random.normal((N_STATES, head.hidden_size), key=mx.random.key(0)).astype(dtype)
    single = [head.dense_logits(hidden[i : i + 1]) for i in range(N_STATES)]
    epsilon = _EPSILON[single[0].dtype]
    apart, apart_scored, same = 0.0, 0.0, True
    together = SlotProduct(head, hidden).result().reshape(N_STATES, -1)
    in_order = mx.take(together, head.clustered.slot_of, axis=-1)
    with head.settings(n_probes=min(64, head.n_clusters)):
        for i, logits in enumerate(single):
            largest = cast(float, mx.max(mx.abs(logits)).item())
            apart = max(apart, _distance(in_order[i : i + 1], logits, largest))
            ids, scored = head.candidates(hidden[i : i + 1])
            wanted = mx.take_along_axis(logits, mx.minimum(ids, head.vocab_size - 1), axis=-1)
            wanted = mx.where(ids < head.vocab_size, wanted, scored)
            same = same and bool(mx.array_equal(scored, wanted).item())
            apart_scored = max(apart_scored, _distance(scored, wanted, largest))
    sums = SIGMAS * math.sqrt(head.hidden_size) * 2.0**-24
    floor = sums + (ULPS * epsilon if epsilon > 2.0**-20 else 0)
    distance_of_scored = 0.0 if same else max(floor, MEASURED * apart_scored)
    return Rounding(epsilon, max(floor, MEASURED * apart), distance_of_scored)


def _distance(values: mx.array, others: mx.array, largest: float) -> float:
    apart = mx.abs(values.astype(mx.float32) - others.astype(mx.float32))
    return cast(float, mx.max(apart).item()) / max(largest, 1e-30)
