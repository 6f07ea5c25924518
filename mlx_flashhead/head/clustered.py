"""A head's rows in cluster order, with the centroids that route among them."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .matrix import Matrix

# Bias of clusters that are always probed: above every real score, finite and exact in float32.
ALWAYS_PROBED = 1e30

# Rows are laid out by columns in this number of pieces, of which ten exist at once.
PIECES = 4096


@dataclass(frozen=True)
class Centroids:
    """The centroids of the clusters, by whose scores the clusters are chosen.

    Attributes:
        matrix: (C, D), without a bias of its own.
        bias: (C,) float32, added to the scores.
        tail_offset: (C,) float32, added to a score for the logit of the cluster's tokens.
    """

    matrix: Matrix
    bias: mx.array
    tail_offset: mx.array

    @property
    def routing_bytes(self) -> int:
        """Bytes read to choose the clusters."""
        return self.matrix.nbytes + self.bias.nbytes

    def fits(self, n_clusters: int, hidden_size: int) -> bool:
        """Returns whether these are centroids for ``n_clusters`` clusters of rows (V, D).

        Their format must also be one that the kernels read.
        """
        matrix = self.matrix
        width = float(hidden_size)
        fits = matrix.weight.dtype != mx.uint32
        if matrix.scales is not None and matrix.biases is not None:
            width = hidden_size * matrix.bits / 32
            groups = (n_clusters, hidden_size / matrix.group_size)
            fits = not fits and matrix.scales.shape == matrix.biases.shape == groups
        fits &= self.bias.shape == self.tail_offset.shape == (n_clusters,)
        fits &= matrix.weight.shape == (n_clusters, width)
        return fits and matrix.format.metal is not None


@dataclass(frozen=True)
class ClusteredRows:
    """Rows stored once, each cluster one contiguous block.

    Attributes:
        rows: Arrays of shape (C, cluster_size, …). A padded slot repeats a real row.
        token_ids: (C, cluster_size) uint32. V marks a padded slot.
        slot_of: (V,) uint32, the slot c·cluster_size + i that holds a token.
        centroids: The centroids of the clusters.
        route_bias: (C,) float32, the centroids' bias, ALWAYS_PROBED for forced clusters.
        by_column: Whether each cluster's (n, D) weight lies in memory as (D, n), for a CPU's BLAS.
    """

    rows: Matrix
    token_ids: mx.array
    slot_of: mx.array
    centroids: Centroids
    route_bias: mx.array
    by_column: bool = False

    @property
    def vocab_size(self) -> int:
        """The number of tokens V."""
        return self.slot_of.shape[0]

    @property
    def n_clusters(self) -> int:
        """The number of clusters C."""
        return self.token_ids.shape[0]

    @property
    def cluster_size(self) -> int:
        """The number of slots of a cluster."""
        return self.token_ids.shape[1]

    @property
    def padded(self) -> bool:
        """Whether some slots hold no token."""
        return self.token_ids.size > self.vocab_size

    @classmethod
    def build(
        cls,
        rows: Matrix,
        token_ids: np.ndarray,
        centroids: Centroids,
        always_probed_ids: tuple[int, ...] = (),
        by_column: bool = False,
    ) -> "ClusteredRows":
        """Reorders rows in token order, lazily.

        Args:
            rows: The rows (V, D) in token order.
            token_ids: (C, cluster_size), a permutation of 0 … V-1 padded with V.
            centroids: The centroids of the C clusters.
            always_probed_ids: Tokens whose clusters are probed in any case.
            by_column: Whether each cluster's (n, D) weight lies in memory as (D, n).

        Raises:
            ValueError: If ``token_ids`` are no such permutation.
        """
        vocab_size = rows.n_rows
        n_clusters, cluster_size = token_ids.shape
        flat = np.asarray(token_ids, dtype=np.int64).ravel()
        # Padded slots come last.
        order = np.argsort(flat, kind="stable")
        expected = np.minimum(np.arange(max(flat.size, vocab_size)), vocab_size)
        is_permutation = np.array_equal(flat[order], expected)
        if not (is_permutation and centroids.fits(n_clusters, rows.hidden_size)):
            raise ValueError(
                f"token_ids must hold each of the {vocab_size} tokens exactly once (padded with "
                f"{vocab_size}) and the centroids must fit {n_clusters} clusters of rows with "
                f"{rows.hidden_size} columns: convert the model again."
            )
        slot_of = order[:vocab_size]
        forced_ids = [i for i in always_probed_ids if 0 <= i < vocab_size]
        forced = slot_of[forced_ids]
        route_bias = np.array(centroids.bias, dtype=np.float32)
        route_bias[forced // cluster_size] = ALWAYS_PROBED
        ids = mx.array(token_ids.astype(np.uint32))
        source_rows = mx.minimum(ids, vocab_size - 1)
        clustered = rows.take(source_rows)
        if by_column:
            clustered = replace(clustered, weight=in_columns(rows.weight, source_rows))
        return cls(
            rows=clustered,
            token_ids=ids,
            slot_of=mx.array(slot_of.astype(np.uint32)),
            centroids=centroids,
            route_bias=mx.array(route_bias),
            by_column=by_column,
        )

    def arrays(self) -> list[mx.array]:
        """Every array, for evaluation and for counting bytes."""
        return [
            *self.rows.arrays().values(),
            *self.centroids.matrix.arrays().values(),
            self.centroids.bias,
            self.centroids.tail_offset,
            self.route_bias,
            self.token_ids,
            self.slot_of,
        ]

    def flat_rows(self) -> Matrix:
        """The rows in slot order, (C·cluster_size, …): a view, or a copy of rows by columns."""
        return self.rows.map(lambda array: array.reshape(-1, *array.shape[2:]))

    def token_rows(self, token_ids: mx.array | None = None) -> Matrix:
        """Returns the rows of ``token_ids``, or all in the model's own order.

        They are gathered anew (lazily) at each call. The ids are integers of any shape, which
        becomes the leading axes.
        """
        slots = self.slot_of
        if token_ids is not None:
            slots = mx.take(slots, token_ids)
        if self.by_column:
            clusters, numbers = mx.divmod(slots, self.cluster_size)
            return self.rows.map(lambda array: array[clusters, numbers])

        def in_slots(array: mx.array) -> mx.array:
            flat = array.reshape(-1, *array.shape[2:])
            return mx.take(flat, slots, axis=0)

        return self.rows.map(in_slots)

    def embeddings(self, token_ids: mx.array) -> mx.array:
        """The rows of some tokens as floats: ids (...) → (..., D). Lazy."""
        if not self.by_column or self.rows.quantized:
            return self.token_rows(token_ids).dequantized()
        slots = mx.take(self.slot_of, token_ids)
        clusters, numbers = mx.divmod(slots, self.cluster_size)
        # A step on a CPU embeds each time: it does without `token_rows`.
        return self.rows.weight[clusters, numbers]


def in_token_order(slots: mx.array, slot_of: mx.array) -> mx.array:
    """Logits by slot (R, C·n) → by token (R, V). `take` is five to ten times slower on a CPU."""
    return mx.take_along_axis(slots, slot_of[None], axis=-1)


def in_columns(weight: mx.array, order: mx.array) -> mx.array:
    """Rows ``order`` (C, n) of ``weight`` (V, D), laid out as (C, D, n), as a view (C, n, D)."""
    n_clusters, cluster_size = order.shape
    columns = mx.zeros((n_clusters, weight.shape[1], cluster_size), dtype=weight.dtype)
    # Pieces are written one after the other, without a second copy of all rows.
    size = -(-n_clusters // PIECES)
    for start in range(0, n_clusters, size):
        part = slice(start, start + size)
        columns[part] = mx.take(weight, order[part], axis=0).swapaxes(-1, -2)
    # One piece alone would be a view.
    return mx.contiguous(columns).swapaxes(-1, -2)
