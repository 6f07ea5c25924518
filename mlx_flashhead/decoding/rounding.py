"""How far two ways of computing a logit may lie apart, and the product of several states."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..head.backend import logits_of_scores, shows_other_sums
from ..head.dense_kernels import ANY_ROWS, DenseKernel, dense_kernel, mlx_version
from ..head.flash_head import FlashHead
from ..head.margins import FLOAT32, IN_16_BITS, MEASURED_TIMES, TF32, ULPS
from ..head.matrix import Matrix
from ..head.proposal import Tolerance
from ..head.steps import PortableSteps
from ..models.cpu_products import numpy_is_faster, slot_products, to_mlx

CLASSES = (1, 2, 4, 8, 16, 32)  # sizes of a product whose kernels and rounding are the same
WORTH_A_THREAD = 10_000_000  # multiply-adds, a millisecond of work
N_STATES = 3  # states whose products are compared for the rounding
# An M1 to M4 has no matrix units that take TF32. Those of an M5 and later do so unless
# MLX_ENABLE_TF32 is 0. Source: `is_nax_available` and `enable_tf32` in MLX's matmul.cpp.
WITHOUT_TF32 = re.compile(r"applegpu_g1[0-6]")
PIECE = 1024  # clusters whose rows are floats at once
# MLX up to 0.32.3 cuts sums of several states with quantized rows into parts, where the rows are
# few: for about 512 threadgroups of 32 rows. Source: `qmm_splitk` in quantized.cpp.
PARTS = 512 * 32

_worker = ThreadPoolExecutor(1, "verification")  # whose thread begins with the first product


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n).

    They are lazy. On a CPU where numpy is faster than MLX's BLAS, a thread computes them beside the
    steps of the model.

    Args:
        head: Whose rows are multiplied.
        hidden: (k, D), the states.
        sources: For each state an array (R, D) that has been computed already, and a row of it. A
            thread takes them from there, since ``hidden`` may wait for the step that is running.
    """

    def __init__(
        self,
        head: FlashHead,
        hidden: mx.array,
        sources: Sequence[tuple[mx.array, int]] | None = None,
    ):
        self._head = head
        self._k = len(hidden)
        rows = head.clustered.rows
        self._future: Future[np.ndarray] | None = None
        by_numpy = rows.weight.dtype == mx.float32 and numpy_is_faster()
        if by_numpy and self._k * rows.weight.size >= WORTH_A_THREAD:
            if sources is None:
                states = np.asarray(hidden.astype(mx.float32))
            else:
                states = np.stack([np.asarray(each.astype(mx.float32))[i] for each, i in sources])
            self._future = _worker.submit(slot_products, np.asarray(rows.weight), states)
        missing = product_size(self._k) - self._k
        self._hidden = mx.pad(hidden, [(0, missing), (0, 0)]) if missing else hidden

    @property
    def ready(self) -> bool:
        """Whether :meth:`result` does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> mx.array:
        """Returns the logits (k, C, n), after waiting for the thread if there is one."""
        if self._future is None:
            return self._head.slot_logits(self._hidden)[: self._k]
        logits = to_mlx(self._future.result())
        bias = self._head.clustered.rows.bias
        return logits if bias is None else logits + bias


def product_size(k: int) -> int:
    """Returns the size to which a product of ``k`` states is filled up.

    Its kernel is then the one whose rounding is known. A CPU has one for all sizes.
    """
    if mx.default_device().type == mx.cpu:
        return k
    return next((size for size in CLASSES if size >= k), -(-k // CLASSES[-1]) * CLASSES[-1])


@dataclass(frozen=True)
class RoundedSums:
    """Sums of a few hidden values that a single state's kernel rounds to 16 bits.

    It rounds them before they meet the offsets of affine rows: MLX up to 0.32.3. See
    head/dense_kernels.py.

    Attributes:
        dtype: The dtype to which each addition is rounded.
        added: The number of hidden values in a sum.
        group_size: Columns that share an offset.
        longest: Length of the longest row of offsets.
    """

    dtype: mx.Dtype
    added: int
    group_size: int
    longest: float

    def tolerance(self, hidden: mx.array) -> mx.array:
        """How much the rounding changes a logit at most: states (k, D) → (k,) float32."""
        shape = (len(hidden), -1, self.group_size // self.added, self.added)
        values = hidden.astype(self.dtype).reshape(shape)
        rounded = values[..., 0]
        for i in range(1, self.added):
            rounded = rounded + values[..., i]
        lost = rounded.astype(mx.float32) - values.astype(mx.float32).sum(axis=-1)
        return mx.linalg.norm(lost.sum(axis=-1), axis=-1) * self.longest


@dataclass(frozen=True)
class Rounding:
    """How far a head's logits may lie from those that each state has alone.

    Attributes:
        epsilon: Spacing of the logits' dtype, relative to a logit.
        longest: Length of the longest row, with its bias.
        product: How far a logit of a product of several states may lie: a share of the state's
            length times the longest row's.
        scored: How far a scored logit may lie, as such a share; 0 where it is the same number.
        sums: What the product of a single state loses in addition.
    """

    epsilon: float
    longest: float
    product: float
    scored: float
    sums: RoundedSums | None = None

    def tolerance(self, hidden: mx.array, steps: PortableSteps) -> Tolerance:
        """Returns how far logits of states (k, D) may lie from those of each state alone.

        The head's ``steps`` compute it.
        """
        product, scored = steps.tolerances(hidden, self.longest, self.product, self.scored)
        if self.sums is not None:
            lost = self.sums.tolerance(hidden)
            product = product + lost
            scored = scored + lost if self.scored else scored
        return Tolerance(product, scored, ULPS * self.epsilon if self.epsilon > IN_16_BITS else 0.0)


_roundings: WeakKeyDictionary[FlashHead, dict[mx.Dtype, dict[int, Rounding]]] = WeakKeyDictionary()


def rounding_of(head: FlashHead, dtype: mx.Dtype, k: int) -> Rounding:
    """The bounds for products of ``k`` states of ``dtype``, measured by now or else at once."""
    by_size = measure_rounding(head, dtype)
    return next((by_size[size] for size in by_size if size >= k), by_size[max(by_size)])


def measure_rounding(head: FlashHead, dtype: mx.Dtype) -> dict[int, Rounding]:
    """Measures the bounds for products of states, for each class of their number.

    Evaluates, once for a head.

    A sum of D products in float32 lies within D·2^-24 of Σ|h·w| ≤ ‖h‖·‖w‖, in whichever order it is
    made. MLX is known to round some products more coarsely, which is added: rows of few bits, which
    become 16 bits first; TF32; sums in parts; sums of hidden values. If four times what a few
    states show on this machine is more, that counts.

    A scored logit has no tolerance if those of some states are the dense ones to the last bit, and
    both are the same sums by the table of MLX's kernels.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1.

    Args:
        head: The head whose products are measured.
        dtype: The dtype of the states.

    Returns:
        The bounds for each class of the number of states.
    """
    known = _roundings.setdefault(head, {})
    if dtype not in known:
        known[dtype] = dict(_measured(head, dtype))
    return known[dtype]


def _measured(head: FlashHead, dtype: mx.Dtype) -> Iterator[tuple[int, Rounding]]:
    hidden = mx.random.normal((CLASSES[-1], head.hidden_size), key=mx.random.key(0)).astype(dtype)
    states = [hidden[i : i + 1] for i in range(N_STATES)]
    alone = mx.concatenate([head.dense_logits(state) for state in states])
    rows = head.clustered.rows
    longest, longest_offsets = _longest_rows(head)
    kernel = _dense_kernel(head)
    epsilon = mx.finfo(alone.dtype).eps
    product_dtype = rows.product_dtype(dtype)
    sums = None
    if kernel is not None and kernel.added > 1 and product_dtype != mx.float32:
        sums = RoundedSums(product_dtype, kernel.added, rows.group_size, longest_offsets)
    allowed = mx.zeros((N_STATES, 1))  # known roundings
    if epsilon > IN_16_BITS:
        allowed = ULPS * epsilon * mx.abs(alone).astype(mx.float32)
    if sums is not None:
        allowed = allowed + sums.tolerance(hidden[:N_STATES])[:, None]
    norms = mx.linalg.norm(hidden[:N_STATES].astype(mx.float32), axis=-1, keepdims=True)
    lengths = norms * longest

    in_float32 = 2 * (head.hidden_size + 1) * FLOAT32
    scored_share = 0.0
    if not _scores_are_dense(head, dtype):
        scored = mx.concatenate([logits_of_scores(head.steps, state) for state in states])
        scored_share = max(in_float32, _share_beyond(allowed, scored, alone, lengths))
    for size in _classes():
        starts = range(0, N_STATES, size)
        products = [SlotProduct(head, hidden[i : i + size]).result() for i in starts]
        slots = mx.concatenate(products)[:N_STATES].reshape(N_STATES, -1)
        together = mx.take(slots, head.clustered.slot_of, axis=-1)
        known = in_float32 + _coarser(rows, head.clustered.token_ids.size, product_dtype, size)
        share = max(known, _share_beyond(allowed, together, alone, lengths))
        yield size, Rounding(epsilon, longest, share, scored_share, sums)


def _scores_are_dense(head: FlashHead, dtype: mx.Dtype) -> bool:
    """Whether scored logits are the dense ones to the last bit: by MLX's table, and as seen.

    In 16 bits few logits show another order of sums, so that those of a small vocabulary do not do.
    """
    kernel = _dense_kernel(head)
    if kernel is not None and not kernel.scored:
        return False
    shown = shows_other_sums(head.vocab_size, head.clustered.rows.logits_dtype(dtype))
    return shown and head.scored_logits_agree(dtype) == 1


def _share_beyond(allowed: mx.array, logits: mx.array, alone: mx.array, lengths: mx.array) -> float:
    """The greatest distance of logits beyond known roundings, with a margin.

    Args:
        allowed: (k, V) or (k, 1), how far known roundings may move the logits.
        logits: (k, V).
        alone: (k, V), the dense logits of each state alone.
        lengths: (k, 1), products of the lengths of a state and of the longest row.

    Returns:
        A share of ``lengths``.
    """
    distance = mx.abs(logits.astype(mx.float32) - alone.astype(mx.float32)) - allowed
    return MEASURED_TIMES * max(cast(float, mx.max(distance / lengths).item()), 0.0)


def _classes() -> tuple[int, ...]:
    """The sizes of products that differ in their rounding. A CPU has one kernel for all."""
    return (N_STATES,) if mx.default_device().type == mx.cpu else CLASSES


def _coarser(rows: Matrix, n_rows: int, dtype: mx.Dtype, n_states: int) -> float:
    """Returns what MLX may round more coarsely in a product of several states.

    The result is a share of both lengths, for ``n_rows`` rows and products of ``dtype``.
    """
    if dtype == mx.float32:
        return TF32 if n_states > 1 and may_use_tf32() else 0.0
    if not rows.quantized:
        return 0.0
    half = mx.finfo(dtype).eps / 2
    # the rows become 16 bits; so does each part of a sum, and each sum of parts
    n_parts = PARTS // n_rows
    are_cut = mx.default_device().type != mx.cpu and mlx_version() < ANY_ROWS and n_parts > 1
    return half * (1 + n_parts if are_cut else 1)


def differs_among_others(dtype: mx.Dtype) -> bool:
    """Whether a state's logits of ``dtype`` may be others in a product of several states.

    By more than float32's own rounding: in 16 bits, or where float32 becomes TF32.
    """
    return dtype != mx.float32 or may_use_tf32()


def may_use_tf32() -> bool:
    """Whether MLX may multiply several float32 states in TF32 on this machine."""
    if mx.default_device().type == mx.cpu:
        return False
    return WITHOUT_TF32.match(str(mx.device_info().get("architecture"))) is None


def _dense_kernel(head: FlashHead) -> DenseKernel | None:
    """MLX's kernel for one state; None on a CPU."""
    if mx.default_device().type == mx.cpu:
        return None
    return dense_kernel(head.clustered.rows, head.vocab_size)


def _longest_rows(head: FlashHead) -> tuple[float, float]:
    """The length of the longest row with its bias, and that of the longest row of offsets."""
    rows = head.clustered.rows
    longest = longest_offsets = mx.array(0.0)
    for start in range(0, head.n_clusters, PIECE):  # all at once would take much memory
        part = rows.map(itemgetter(slice(start, start + PIECE)))
        lengths = mx.linalg.norm(part.dequantized(mx.float32), axis=-1)
        if part.bias is not None:
            lengths = lengths + mx.abs(part.bias).astype(mx.float32)
        longest = mx.maximum(longest, mx.max(lengths))
        if part.biases is not None:
            offsets = mx.linalg.norm(part.biases.astype(mx.float32), axis=-1)
            longest_offsets = mx.maximum(longest_offsets, mx.max(offsets))
        mx.eval(longest, longest_offsets)
    return cast(float, longest.item()), cast(float, longest_offsets.item())
