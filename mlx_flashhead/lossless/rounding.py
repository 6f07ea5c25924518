"""The dense product of several states at once, and how far its logits may lie from those of one
state by itself."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..head.flash_head import FlashHead
from ..head.steps import Proposal
from ..models.cpu_products import numpy_is_faster, slot_products, to_mlx
from .policy import product_size

WORTH_A_THREAD = 10_000_000  # multiply-adds, a millisecond of work
N_STATES = 3  # whose products are compared for the rounding
ULPS = 2  # of the result's dtype: each of two values is rounded to the nearest
MEASURED = 4  # times what was measured on a few states
_EPSILON = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n): lazy, or computed by a
    thread beside the steps of the model, on a CPU whose BLAS numpy beats."""

    def __init__(self, head: FlashHead, hidden: mx.array):
        self._head, self._k = head, len(hidden)
        self._future: Future[np.ndarray] | None = None
        rows = head.clustered.rows
        by_numpy = rows.weight.dtype == mx.float32 and numpy_is_faster()
        if by_numpy and len(hidden) * rows.weight.size >= WORTH_A_THREAD:
            states = np.asarray(hidden.astype(mx.float32))
            self._future = _worker().submit(slot_products, np.asarray(rows.weight), states)
            return
        # A product has the kernel of its class of sizes, whose rounding is known.
        missing = product_size(self._k) - self._k
        if missing:
            hidden = mx.pad(hidden, [(0, missing), (0, 0)])
        self._hidden = hidden

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> mx.array:
        if self._future is None:
            return self._head.slot_logits(self._hidden)[: self._k]
        logits = to_mlx(self._future.result())
        bias = self._head.clustered.rows.bias
        return logits if bias is None else logits + bias


@lru_cache(maxsize=1)
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "verification")


@dataclass(frozen=True)
class Rounding:
    """Bounds of the differences of a head's logits: ``norm`` times the length of the state and
    that of the longest row, and a rounding to the logits' dtype."""

    epsilon: float  # spacing of the logits' dtype, relative to a logit
    longest: float  # length of the longest row, with its bias
    product: float  # of a product of several states, relative to both lengths
    scored: float  # of a scored token's logit, likewise; 0 if it is the same number

    def rooms(self, proposal: Proposal, depth: mx.array | float = 0.0) -> tuple[mx.array, mx.array]:
        """How far a logit of the product, and a scored one, may lie off: (k,) float32 each.

        ``depth`` (k,): how far below the best logit a token may still win, by its noise.
        """
        norms = mx.linalg.norm(proposal.hidden.astype(mx.float32), axis=-1)
        terms = norms * self.longest + self.longest
        logits = proposal.logits.flatten(1)
        best = mx.max(logits, axis=-1).astype(mx.float32)
        last_places = ULPS * self.epsilon * (mx.abs(best) + depth) if self.epsilon > 1e-6 else 0.0
        room = self.product * terms + last_places
        if not self.scored:
            return room, mx.zeros_like(room)
        return room, self.scored * terms + last_places


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
    key = dtype, size
    if key not in known:
        known[key] = _measure(head, dtype, size)
    return known[key]


def _measure(head: FlashHead, dtype: mx.Dtype, k: int) -> Rounding:
    n_states = max(N_STATES, k)
    hidden = mx.random.normal((n_states, head.hidden_size), key=mx.random.key(0)).astype(dtype)
    single = [head.dense_logits(hidden[i : i + 1]) for i in range(N_STATES)]
    epsilon = _EPSILON[single[0].dtype]
    together = SlotProduct(head, hidden).result().reshape(n_states, -1)
    in_order = mx.take(together, head.clustered.slot_of, axis=-1)
    longest = _longest_row(head)
    apart, apart_scored, same = 0.0, 0.0, True
    with head.settings(n_probes=min(64, head.n_clusters)):
        for i, logits in enumerate(single):
            norm = cast(float, mx.linalg.norm(hidden[i].astype(mx.float32)).item()) * longest
            apart = max(apart, _excess(in_order[i : i + 1], logits, epsilon) / norm)
            ids, scored = head.candidates(hidden[i : i + 1])
            wanted = mx.take_along_axis(logits, mx.minimum(ids, head.vocab_size - 1), axis=-1)
            wanted = mx.where(ids < head.vocab_size, wanted, scored)
            same = same and bool(mx.array_equal(scored, wanted).item())
            apart_scored = max(apart_scored, _excess(scored, wanted, epsilon) / norm)
    sums = 2 * (head.hidden_size + 1) * 2.0**-24
    rows = head.clustered.rows
    rounded = epsilon / 2 if rows.quantized and epsilon > 1e-6 else 0.0
    scored_room = 0.0 if same else max(sums, MEASURED * apart_scored)
    return Rounding(epsilon, longest, max(sums + rounded, MEASURED * apart), scored_room)


def _excess(values: mx.array, others: mx.array, epsilon: float) -> float:
    """The greatest distance beyond the rounding to the logits' dtype."""
    values, others = values.astype(mx.float32), others.astype(mx.float32)
    allowed = ULPS * epsilon * mx.abs(others) if epsilon > 1e-6 else 0.0
    return max(cast(float, mx.max(mx.abs(values - others) - allowed).item()), 0.0)


def _longest_row(head: FlashHead) -> float:
    longest, rows = 0.0, head.clustered.rows
    for start in range(0, head.n_clusters, 1024):
        part = rows.take(mx.arange(start, min(start + 1024, head.n_clusters)))
        norms = mx.linalg.norm(part.dequantized(mx.float32), axis=-1)
        if rows.bias is not None:
            norms = norms + mx.abs(rows.bias[start : start + 1024]).astype(mx.float32)
        longest = max(longest, cast(float, mx.max(norms).item()))
    return longest
