"""The product that verifies, and how far its numbers may lie from those of a state alone.

All rows are multiplied with the states of several proposals at once, in the order of the clusters,
so that each row is read once for all of them. MLX rounds such a product otherwise than that of a
single state.
"""

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from .backend import numpy_is_faster
from .clustered import ClusteredRows, in_token_order
from .dense_kernels import ANY_ROWS, DenseKernel, dense_kernel, mlx_version
from .margins import FLOAT32, IN_16_BITS, MEASURED_TIMES, TF32, ULPS
from .matrix import Matrix, as_float32, to_mlx
from .operations import PortableOperations
from .proposal import Tolerance
from .same_sums import DenseLogits, logits_of_scores, scores_agree, shows_other_sums

# Sizes of a product: of up to so many states the kernels and the rounding are the same.
CLASSES = (1, 2, 4, 8, 16, 32)
# So many multiply-adds are a millisecond of work.
WORTH_A_THREAD = 10_000_000
# So many states' products are compared for the rounding.
N_STATES = 3
# An M1 to M4 has no matrix units that take TF32. Those of an M5 and later do so unless
# MLX_ENABLE_TF32 is 0. Source: `is_nax_available` and `enable_tf32` in MLX's matmul.cpp.
WITHOUT_TF32 = re.compile(r"applegpu_g1[0-6]")
# The rows of so many clusters are floats at once.
PIECE = 1024
# MLX up to 0.32.3 cuts sums of several states with quantized rows into parts, where the rows are
# few: for about 512 threadgroups of 32 rows. Source: `qmm_splitk` in quantized.cpp.
PARTS = 512 * 32

# Its thread begins with the first product.
_worker = ThreadPoolExecutor(1, "verification")

# States (R, D), and the position of one of them.
Source = tuple[mx.array, int]


class SlotProduct:
    """Logits of states (k, D) in the order of the clusters, (k, C, n).

    They are lazy. On a CPU where numpy is faster than MLX's BLAS, a thread computes them beside the
    steps of the model.

    Args:
        operations: Of the head whose rows are multiplied.
        hidden: (k, D), the states.
        sources: For each state an array that has been computed already, and its position there. A
            thread takes them from there, since ``hidden`` may wait for the step that is running.
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
                states = np.stack([as_float32(each)[position] for each, position in sources])
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

    def tolerance(self, hidden: mx.array, operations: PortableOperations) -> Tolerance:
        """Returns how far logits of states (k, D) may lie from those of each state alone.

        The head's ``operations`` compute it.
        """
        product, scored = operations.tolerances(hidden, self.longest, self.product, self.scored)
        if self.sums is not None:
            lost = self.sums.tolerance(hidden)
            product = product + lost
            if self.scored:
                scored = scored + lost
        relative = 0.0
        if self.epsilon > IN_16_BITS:
            relative = ULPS * self.epsilon
        return Tolerance(product, scored, relative)


class Stretch(NamedTuple):
    """What biases and penalties may make of the distance of two logits.

    Attributes:
        factor: The most that they can stretch it.
        n_roundings: Roundings of a logit that they change.
    """

    factor: float = 1.0
    n_roundings: int = 0


def stretched(
    scored: mx.array, logits: mx.array, stretches: Sequence[Stretch], epsilon: float
) -> mx.array:
    """How far the scored logits of k states may be off after biases and penalties.

    Args:
        scored: (k,) float32, before them; 0 where they are exact.
        logits: (k, S, n), after them.
        stretches: Of each state.
        epsilon: Spacing of the logits' dtype.

    Returns:
        (k,) float32.
    """
    roundings = [stretch.n_roundings for stretch in stretches]
    if not any(roundings):
        return scored
    factors = [stretch.factor for stretch in stretches]
    # These are neither padded nor ruled out.
    real = logits > mx.finfo(logits.dtype).min
    sizes = mx.abs(mx.where(real, logits, 0))
    largest = mx.max(sizes, axis=(1, 2)).astype(mx.float32)
    rounded = epsilon * mx.array(roundings) * largest
    after = scored * mx.array(factors) + rounded
    return mx.where(scored > 0, after, 0.0)


def measure_rounding(
    operations: PortableOperations, dense_logits: DenseLogits, dtype: mx.Dtype
) -> dict[int, Rounding]:
    """Measures the bounds for products of states, for each class of their number. Evaluates.

    A sum of D products in float32 lies within D·2^-24 of Σ|h·w| ≤ ‖h‖·‖w‖, in whichever order it is
    made. MLX is known to round some products more coarsely, which is added: rows of few bits, which
    become 16 bits first; TF32; sums in parts; sums of hidden values. If four times what a few
    states show on this machine is more, that counts.

    A scored logit has no tolerance if those of some states are the dense ones to the last bit, and
    both are the same sums by the table of MLX's kernels.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1.

    Args:
        operations: Of the head whose products are measured.
        dense_logits: The dense logits of a state alone: (1, D) → (1, V).
        dtype: Of the states.

    Returns:
        The bounds for each class of the number of states.
    """
    clustered = operations.clustered
    rows = clustered.rows
    shape = CLASSES[-1], rows.hidden_size
    hidden = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    states = [hidden[i : i + 1] for i in range(N_STATES)]
    alone = mx.concatenate([dense_logits(state) for state in states])
    longest, longest_offsets = _longest_rows(clustered)
    kernel = _dense_kernel(clustered)
    epsilon = mx.finfo(alone.dtype).eps
    product_dtype = rows.product_dtype(dtype)
    sums = None
    if kernel is not None and kernel.added > 1 and product_dtype != mx.float32:
        sums = RoundedSums(product_dtype, kernel.added, rows.group_size, longest_offsets)
    # Known roundings allow so much.
    allowed = mx.zeros((N_STATES, 1))
    if epsilon > IN_16_BITS:
        allowed = ULPS * epsilon * mx.abs(alone).astype(mx.float32)
    if sums is not None:
        allowed = allowed + sums.tolerance(hidden[:N_STATES])[:, None]
    norms = mx.linalg.norm(hidden[:N_STATES].astype(mx.float32), axis=-1, keepdims=True)
    lengths = norms * longest

    in_float32 = 2 * (rows.hidden_size + 1) * FLOAT32
    scored_share = 0.0
    if not _scores_are_dense(operations, dense_logits, dtype):
        scored = mx.concatenate([logits_of_scores(operations, state) for state in states])
        scored_share = max(in_float32, _share_beyond(allowed, scored, alone, lengths))
    found = {}
    for size in _classes():
        starts = range(0, N_STATES, size)
        products = [SlotProduct(operations, hidden[i : i + size]).result() for i in starts]
        slots = mx.concatenate(products)[:N_STATES].reshape(N_STATES, -1)
        together = in_token_order(slots, clustered.slot_of)
        known = in_float32 + _coarser(rows, clustered.token_ids.size, product_dtype, size)
        share = max(known, _share_beyond(allowed, together, alone, lengths))
        found[size] = Rounding(epsilon, longest, share, scored_share, sums)
    return found


def _scores_are_dense(
    operations: PortableOperations, dense_logits: DenseLogits, dtype: mx.Dtype
) -> bool:
    """Whether scored logits are the dense ones to the last bit: by MLX's table, and as seen.

    In 16 bits few logits show another order of sums, so that those of a small vocabulary do not do.
    """
    clustered = operations.clustered
    kernel = _dense_kernel(clustered)
    if kernel is not None and not kernel.scored:
        return False
    shown = shows_other_sums(clustered.vocab_size, clustered.rows.logits_dtype(dtype))
    return shown and scores_agree(operations, dense_logits, dtype) == 1


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
    distance = mx.abs(logits.astype(mx.float32) - alone.astype(mx.float32))
    shares = (distance - allowed) / lengths
    largest = cast(float, mx.max(shares).item())
    return MEASURED_TIMES * max(largest, 0.0)


def _classes() -> tuple[int, ...]:
    """The sizes of products that differ in their rounding. A CPU has one kernel for all."""
    if mx.default_device().type == mx.cpu:
        return (N_STATES,)
    return CLASSES


def _coarser(rows: Matrix, n_rows: int, dtype: mx.Dtype, n_states: int) -> float:
    """Returns what MLX may round more coarsely in a product of several states.

    The result is a share of both lengths, for ``n_rows`` rows and products of ``dtype``.
    """
    if dtype == mx.float32:
        return TF32 if n_states > 1 and may_use_tf32() else 0.0
    if not rows.quantized:
        return 0.0
    # The rows become 16 bits.
    half = mx.finfo(dtype).eps / 2
    n_parts = PARTS // n_rows
    are_cut = mx.default_device().type != mx.cpu and mlx_version() < ANY_ROWS and n_parts > 1
    if not are_cut:
        return half
    # So does each part of a sum, and each sum of parts.
    return half * (1 + n_parts)


def differs_in_batches(rows: Matrix, dtype: mx.Dtype) -> bool:
    """Whether a state's logits may be others in a product of several states.

    By more than float32's own rounding: where the product has 16 bits, whatever is made of its
    logits then, or where float32 becomes TF32.

    Args:
        rows: What is multiplied.
        dtype: Of the states.
    """
    return rows.product_dtype(dtype) != mx.float32 or may_use_tf32()


def may_use_tf32() -> bool:
    """Whether MLX may multiply several float32 states in TF32 on this machine."""
    if mx.default_device().type == mx.cpu:
        return False
    return WITHOUT_TF32.match(str(mx.device_info().get("architecture"))) is None


def _dense_kernel(clustered: ClusteredRows) -> DenseKernel | None:
    """MLX's kernel for one state; None on a CPU."""
    if mx.default_device().type == mx.cpu:
        return None
    return dense_kernel(clustered.rows, clustered.vocab_size)


def _longest_rows(clustered: ClusteredRows) -> tuple[float, float]:
    """The length of the longest row with its bias, and that of the longest row of offsets."""
    longest = mx.array(0.0)
    longest_offsets = mx.array(0.0)
    # All at once would take much memory.
    for start in range(0, clustered.n_clusters, PIECE):
        part = clustered.rows.map(itemgetter(slice(start, start + PIECE)))
        lengths = mx.linalg.norm(part.dequantized(mx.float32), axis=-1)
        if part.bias is not None:
            lengths = lengths + mx.abs(part.bias).astype(mx.float32)
        longest = mx.maximum(longest, mx.max(lengths))
        if part.biases is not None:
            offsets = mx.linalg.norm(part.biases.astype(mx.float32), axis=-1)
            longest_offsets = mx.maximum(longest_offsets, mx.max(offsets))
        mx.eval(longest, longest_offsets)
    return cast(float, longest.item()), cast(float, longest_offsets.item())
