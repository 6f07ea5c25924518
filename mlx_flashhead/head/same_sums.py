"""Whether two ways of computing the logits of single states give the same sums, as seen.

Numbers that are added in another order differ in the last bits.
"""

from collections.abc import Callable
from typing import cast

import mlx.core as mx

from .clustered import in_token_order
from .kernel_inputs import MIN_PROBES
from .matrix import Matrix
from .operations import PortableOperations
from .proposal import Selection

# A state (1, D) → its logits (1, V).
DenseLogits = Callable[[mx.array], mx.array]

# So many states' logits are compared, at least: in float32 most logits show another order.
LEAST_STATES = 3
# Of a million logits in 16 bits some forty or more show another order of sums, of 24,000 perhaps
# none. A vocabulary below ENOUGH_LOGITS / MOST_STATES has fewer.
ENOUGH_LOGITS = 1_000_000
MOST_STATES = 128
# So many clusters are scored at once, since a CPU makes a copy of them.
SCORED_AT_ONCE = 1024


def logits_of_scores(operations: PortableOperations, hidden: mx.array) -> mx.array:
    """Logits of all tokens as `score` gives them: (1, D) → (1, V)."""
    clustered = operations.clustered
    n_clusters = clustered.n_clusters
    size = min(n_clusters, SCORED_AT_ONCE)
    # Fewer than MIN_PROBES would need another kernel.
    n_probes = max(size, MIN_PROBES)
    parts = []
    for start in range(0, n_clusters, size):
        first = min(start, n_clusters - size)
        clusters = mx.arange(first, first + n_probes, dtype=mx.uint32)
        probes = mx.minimum(clusters, n_clusters - 1)
        logits = operations.score(hidden, Selection(probes[None])).logits
        parts.append(logits[:, start - first : size])
    slots = mx.concatenate(parts, axis=1).reshape(1, -1)
    return in_token_order(slots, clustered.slot_of)


def n_compared(vocab_size: int, dtype: mx.Dtype) -> int:
    """The number of states whose logits of ``dtype`` are compared: in 16 bits ENOUGH_LOGITS."""
    if dtype == mx.float32:
        return LEAST_STATES
    n_enough = -(-ENOUGH_LOGITS // vocab_size)
    return max(LEAST_STATES, min(n_enough, MOST_STATES))


def shows_other_sums(vocab_size: int, dtype: mx.Dtype) -> bool:
    """Whether so many logits of ``dtype`` would show that they are sums in another order."""
    return dtype == mx.float32 or n_compared(vocab_size, dtype) * vocab_size >= ENOUGH_LOGITS


def compared_states(rows: Matrix, vocab_size: int, dtype: mx.Dtype) -> list[mx.array]:
    """Hidden states (1, D) of ``dtype`` on which products with the rows are compared."""
    n_states = n_compared(vocab_size, rows.logits_dtype(dtype))
    states = []
    for seed in range(n_states):
        hidden = mx.random.normal((1, rows.hidden_size), key=mx.random.key(seed))
        states.append(hidden.astype(dtype))
    return states


def scores_agree(
    operations: PortableOperations, dense_logits: DenseLogits, dtype: mx.Dtype
) -> float:
    """Returns the share of logits that scoring gives like the product with one state.

    They must agree to the last bit. Evaluates.

    Args:
        operations: What scores.
        dense_logits: Gives the logits (1, V) of a state (1, D).
        dtype: Of the states.
    """
    clustered = operations.clustered
    states = compared_states(clustered.rows, clustered.vocab_size, dtype)
    n_same = 0
    for hidden in states:
        same = logits_of_scores(operations, hidden) == dense_logits(hidden)
        n_same += cast(int, mx.sum(same).item())
    return n_same / (len(states) * clustered.vocab_size)
