"""The four steps of a FlashHead in plain MLX operations: the CPU path, the fallback and the
reference that the Metal kernels are tested against.

    hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p)
                  ─ score ─▶ logits (R, p·n) ─ expand ─▶ (R, V)   or   ─ token ─▶ (R,)

Nothing here evaluates: a prompt's logits are never asked for, so they must stay lazy.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from .clustered import ClusteredRows

# The tail stays this far below the best candidate, so that greedy decoding always ends on a scored
# token: a cap at the maximum itself ties, and in bfloat16 so does a margin of 0.1.
MARGIN_SHARE = 1 / 64


# Multiply-adds of one product. OpenBLAS (0.3.29, AVX-512) reads a matrix as it lies up to about a
# million of them and first copies it into another order above, which takes three times as long when
# the other side has few rows. From some 24 rows on the copy pays: at 16 blocks took 0.7 to 0.8 of
# the time of one product, at 32 1.1 and at 64 1.5 to 2. (The reference BLAS, several times slower
# than either, takes half the time in blocks at any number.)
BLOCK_PRODUCTS = 500_000
BLOCKED_ROWS = 24


class Selection(NamedTuple):
    """The clusters to score.

    Attributes:
        probes: (R, p) uint32, distinct clusters of each row.
        ranks: (R, C) uint32, a cluster's place among the row's probes and at least p for all
            others; None on the portable path, which does not need it.
    """

    probes: mx.array
    ranks: mx.array | None = None


class Candidates(NamedTuple):
    """The scored rows.

    Attributes:
        logits: (R, p, n) in the dense head's dtype; a padded slot holds the lowest finite value.
        best: (R, p) float32, each probed cluster's best logit; None on the portable path.
    """

    logits: mx.array
    best: mx.array | None = None


def tail_cap(best: mx.array) -> mx.array:
    """The highest logit a token that was not scored may get: m - max(1, |m|/64), float32."""
    best = best.astype(mx.float32)
    return best - mx.maximum(1.0, mx.abs(best) * MARGIN_SHARE)


def blocked_product(hidden: mx.array, weight: mx.array) -> mx.array:
    """``hidden @ weight.T``, for few states in blocks of rows, fastest on a CPU:
    (R, D), (V, D) → (R, V)."""
    n_states, hidden_size = hidden.shape
    if n_states > BLOCKED_ROWS:
        return hidden @ weight.T
    block = _block_rows(len(weight), max(1, BLOCK_PRODUCTS // (n_states * hidden_size)))
    n_blocks = len(weight) // block
    if n_blocks < 2:
        return hidden @ weight.T
    in_blocks = weight[: n_blocks * block].reshape(n_blocks, block, hidden_size)
    products = hidden @ in_blocks.swapaxes(-1, -2)  # (n_blocks, R, block)
    products = products.swapaxes(0, 1).reshape(n_states, -1)
    if n_blocks * block == len(weight):
        return products
    rest = hidden @ weight[n_blocks * block :].T
    return mx.concatenate([products, rest], axis=-1)


@lru_cache
def _block_rows(n_rows: int, most: int) -> int:
    """Rows of a block: as many of ``most`` as leave no rest, if that is a quarter of them or more.

    A rest is a product and a copy of its own: a tenth of the time where there are few blocks.
    """
    return next((size for size in range(most, most // 4, -1) if n_rows % size == 0), most)


def in_token_order(slots: mx.array, slot_of: mx.array) -> mx.array:
    """Logits by slot (R, C·n) → by token (R, V)."""
    # `take` along an axis gives the same, and is five to ten times slower on a CPU
    return mx.take_along_axis(slots, slot_of[None], axis=-1)


class Steps:
    """What both paths share.

    Args:
        clustered: The rows and the index.
    """

    def __init__(self, clustered: ClusteredRows):
        self.clustered = clustered

    def arrays(self) -> list[mx.array]:
        """Arrays held besides those of ``clustered``."""
        return []

    def product(self, hidden: mx.array) -> mx.array:
        """Logits of all slots, in their order: hidden (R, D) → (R, C·n)."""
        return self.clustered.flat_rows().matmul(hidden)

    def dense(self, hidden: mx.array) -> mx.array:
        """Logits of all tokens: hidden (R, D) → (R, V)."""
        return in_token_order(self.product(hidden), self.clustered.slot_of)

    def token_ids(self, probes: mx.array) -> mx.array:
        """Token ids of the probed clusters: (R, p) → (R, p, n) uint32, V for a padded slot."""
        return mx.take(self.clustered.token_ids, probes, axis=0)


class PortableSteps(Steps):
    """Route, select, score, expand and token as MLX operations.

    Args:
        clustered: The rows and the index.
    """

    name = "mlx"

    def __init__(self, clustered: ClusteredRows):
        super().__init__(clustered)
        self._on_cpu = mx.default_device().type == mx.cpu
        # The CPU build multiplies float32 far faster than 4-bit weights, so it keeps the centroids
        # (and only them) dequantised.
        self._centroids = clustered.prototypes.dequantized() if self._on_cpu else None

    def arrays(self) -> list[mx.array]:
        return [] if self._centroids is None else [self._centroids]

    def product(self, hidden: mx.array) -> mx.array:
        rows = self.clustered.flat_rows()
        float32 = not rows.quantized and rows.weight.dtype == hidden.dtype == mx.float32
        if not (self._on_cpu and float32):
            return super().product(hidden)
        logits = blocked_product(hidden, rows.weight)
        return logits if rows.bias is None else logits + rows.bias

    def route(self, hidden: mx.array) -> mx.array:
        """Scores of all clusters: hidden (R, D) → (R, C) float32."""
        prototypes = self.clustered.prototypes
        if self._centroids is not None:
            scores = blocked_product(hidden.astype(mx.float32), self._centroids)
        else:
            scores = prototypes.matmul(hidden).astype(mx.float32)
        return scores + self.clustered.route_bias

    def select(self, scores: mx.array, n_probes: int) -> Selection:
        """The ``n_probes`` best clusters of each row, in no particular order: (R, C) → (R, p)."""
        n_clusters = scores.shape[-1]
        if n_probes == n_clusters:
            every = mx.arange(n_clusters, dtype=mx.uint32)
            return Selection(mx.broadcast_to(every, scores.shape))
        order = mx.argpartition(scores, kth=n_clusters - n_probes, axis=-1)
        return Selection(order[..., n_clusters - n_probes :])

    def score(self, hidden: mx.array, selection: Selection) -> Candidates:
        """Logits of the probed clusters' rows: hidden (R, D) → (R, p, n)."""
        rows, probes = self.clustered.rows, selection.probes
        stacked = hidden[:, None, None, :]  # (R, 1, 1, D) against (R, p) blocks of (n, D)
        if rows.quantized:
            logits = mx.gather_qmm(
                stacked,
                rows.weight,
                rows.scales,
                rows.biases,
                rhs_indices=probes,
                transpose=True,
                **rows.quantization,
            ).squeeze(-2)
        elif rows.weight.dtype == hidden.dtype and not (
            # the CPU build's gather_mm takes float32 only
            self._on_cpu and hidden.dtype != mx.float32
        ):
            # Each state twice: OpenBLAS hands products of one row to another routine, which takes
            # up to twice the time. (The reference BLAS takes a third longer for two rows, and twice
            # as long for the product the other way round.)
            twice = mx.broadcast_to(stacked, (len(hidden), 1, 2, hidden.shape[-1]))
            blocks = rows.weight.swapaxes(-1, -2)
            logits = mx.gather_mm(twice, blocks, rhs_indices=probes)[..., 0, :]
        else:
            blocks = mx.take(rows.weight, probes, axis=0)  # (R, p, n, D)
            logits = (blocks @ hidden[:, None, :, None]).squeeze(-1)
        if rows.bias is not None:
            logits = logits + mx.take(rows.bias, probes, axis=0)
        if self.clustered.padded:
            padded = self.token_ids(probes) == self.clustered.vocab_size
            logits = mx.where(padded, mx.finfo(logits.dtype).min, logits)
        return Candidates(logits)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Full logits: a probed token keeps its own, every other gets its cluster's estimate.

        The estimate is min(S_c - ln n_c, m - max(1, |m|/64)) with the cluster's score S_c, the log
        of its expected mass, over its n_c tokens, and the best candidate logit m.

        Args:
            scores: (R, C) float32 from which the tail is estimated.
            selection: The probed clusters.
            candidates: Their logits.

        Returns:
            (R, V) in the dtype of the candidates' logits.
        """
        logits = candidates.logits
        n_rows, n_clusters = scores.shape
        best = mx.max(logits, axis=(-2, -1), keepdims=True).squeeze(-1)  # (R, 1)
        tail = mx.minimum(scores + self.clustered.prototypes.tail_offset, tail_cap(best))
        if logits.dtype == mx.float16:
            tail = mx.maximum(tail, mx.finfo(mx.float16).min)  # finite here too
        blocks = mx.broadcast_to(tail[..., None], (n_rows, n_clusters, logits.shape[-1]))
        blocks = mx.put_along_axis(
            blocks.astype(logits.dtype), selection.probes[..., None], logits, axis=1
        )
        return in_token_order(blocks.reshape(n_rows, -1), self.clustered.slot_of)

    def token(self, selection: Selection, candidates: Candidates) -> mx.array:
        """The greedy token: (R,) uint32; the lowest id among equals, as argmax over V does."""
        logits = candidates.logits
        best = mx.max(logits, axis=(-2, -1), keepdims=True)
        ids = mx.where(logits == best, self.token_ids(selection.probes), self.clustered.vocab_size)
        return mx.min(ids, axis=(-2, -1))
