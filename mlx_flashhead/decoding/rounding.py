"""How far two ways of computing a logit may lie apart, and the product of several states."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..head.flash_head import FlashHead
from ..head.proposal import Tolerance
from ..models.cpu_products import numpy_is_faster, slot_products, to_mlx

CLASSES = (1, 2, 4, 8, 16, 32)  # sizes of a product whose kernels and rounding are the same
WORTH_A_THREAD = 10_000_000  # multiply-adds, a millisecond of work
N_STATES = 3  # whose products are compared for the rounding
ULPS = 2  # of the result's dtype: each of two values is rounded to the nearest
MEASURED = 4  # times what was measured on a few states
MASS_ROUNDING = 2e-4  # of a sum over all tokens, relative
NOISE_ROUNDING = 1e-5  # of a noisy logit, absolute


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n): lazy, or computed by a
    thread beside the steps of the model, on a CPU whose BLAS numpy beats."""

    def __init__(self, head: FlashHead, hidden: mx.array):
        self._head, self._k, rows = head, len(hidden), head.clustered.rows
        self._future: Future[np.ndarray] | None = None
        by_numpy = rows.weight.dtype == mx.float32 and numpy_is_faster()
        if by_numpy and self._k * rows.weight.size >= WORTH_A_THREAD:
            states = np.asarray(hidden.astype(mx.float32))
            self._future = _worker().submit(slot_products, np.asarray(rows.weight), states)
        missing = product_size(self._k) - self._k
        self._hidden = mx.pad(hidden, [(0, missing), (0, 0)]) if missing else hidden

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> mx.array:
        if self._future is None:
            return self._head.slot_logits(self._hidden)[: self._k]
        logits, bias = to_mlx(self._future.result()), self._head.clustered.rows.bias
        return logits if bias is None else logits + bias


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "verification")


def product_size(k: int) -> int:
    """The size to which a product of ``k`` states is filled up, so that its kernel is that whose
    rounding is known. A CPU has one for all."""
    if mx.default_device().type == mx.cpu:
        return k
    return next((size for size in CLASSES if size >= k), -(-k // CLASSES[-1]) * CLASSES[-1])


@dataclass(frozen=True)
class Rounding:
    """How far a head's logits may lie off: shares of the length of the state times that of the
    longest row, and a rounding to the logits' dtype."""

    epsilon: float  # spacing of the logits' dtype, relative to a logit
    longest: float  # length of the longest row, with its bias
    product: float  # of a product of several states, relative to both lengths
    scored: float  # of a scored token's logit, likewise; 0 if it is the same number

    def tolerance(self, hidden: mx.array) -> Tolerance:
        """How far logits of states (k, D) may lie from those of each state alone."""
        norms = mx.linalg.norm(hidden.astype(mx.float32), axis=-1)
        terms = norms * self.longest + self.longest
        product = self.product * terms
        scored = self.scored * terms if self.scored else mx.zeros_like(product)
        return Tolerance(product, scored, ULPS * self.epsilon if self.epsilon > 1e-6 else 0.0)


_roundings: WeakKeyDictionary[FlashHead, dict[Any, Rounding]] = WeakKeyDictionary()


def rounding_of(head: FlashHead, dtype: mx.Dtype, k: int) -> Rounding:
    """The bounds for products of ``k`` states of ``dtype``. Evaluates once in each class of k.

    A sum of D products in float32 lies within D·2^-24 of Σ|h·w| ≤ ‖h‖·‖w‖, in whichever order it
    is made; rows of few bits are rounded to 16 bits first. What a few states show beyond that, as
    where float32 is computed in fewer bits, counts four times.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1.
    """
    known = _roundings.setdefault(head, {})
    size = N_STATES if mx.default_device().type == mx.cpu else product_size(k)
    if (dtype, size) not in known:
        known[dtype, size] = _measure(head, dtype, max(N_STATES, size))
    return known[dtype, size]


def _measure(head: FlashHead, dtype: mx.Dtype, n_states: int) -> Rounding:
    hidden = mx.random.normal((n_states, head.hidden_size), key=mx.random.key(0)).astype(dtype)
    states = [hidden[i : i + 1] for i in range(N_STATES)]
    alone = mx.concatenate([head.dense_logits(state) for state in states])
    slots = SlotProduct(head, hidden).result()[:N_STATES].reshape(N_STATES, -1)
    together = mx.take(slots, head.clustered.slot_of, axis=-1)
    with head.settings(n_probes=min(64, head.n_clusters)):
        candidates = [head.candidates(state) for state in states]
    ids, scored = (mx.concatenate([*parts]) for parts in zip(*candidates, strict=True))
    wanted = mx.take_along_axis(alone, mx.minimum(ids, head.vocab_size - 1), axis=-1)
    wanted = mx.where(ids < head.vocab_size, wanted, scored)
    longest, rows, epsilon = 0.0, head.clustered.rows, mx.finfo(alone.dtype).eps
    for start in range(0, head.n_clusters, 1024):  # all rows at once would take much memory
        part = rows.take(mx.arange(start, min(start + 1024, head.n_clusters)))
        lengths = mx.linalg.norm(part.dequantized(mx.float32), axis=-1)
        if part.bias is not None:
            lengths = lengths + mx.abs(part.bias).astype(mx.float32)
        longest = max(longest, cast(float, mx.max(lengths).item()))
    norms = mx.linalg.norm(hidden[:N_STATES].astype(mx.float32), axis=-1, keepdims=True)
    in_16_bits = epsilon > 1e-6

    def apart(values: mx.array, others: mx.array) -> float:
        """The greatest distance beyond the rounding to the logits' dtype, times a margin."""
        values, others = values.astype(mx.float32), others.astype(mx.float32)
        allowed = ULPS * epsilon * mx.abs(others) if in_16_bits else 0.0
        beyond = (mx.abs(values - others) - allowed) / (norms * longest)
        return MEASURED * max(cast(float, mx.max(beyond).item()), 0.0)

    sums = 2 * (head.hidden_size + 1) * 2.0**-24
    rounded = epsilon / 2 if rows.quantized and in_16_bits else 0.0
    same = bool(mx.array_equal(scored, wanted).item())
    scored_room = 0.0 if same else max(sums, apart(scored, wanted))
    return Rounding(epsilon, longest, max(sums + rounded, apart(together, alone)), scored_room)
