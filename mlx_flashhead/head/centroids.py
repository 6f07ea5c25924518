"""The centroids of the clusters, with their bias and the offset of the tail."""

from dataclasses import dataclass

import mlx.core as mx

from .matrix import Matrix


@dataclass(frozen=True)
class Centroids:
    """Centroids, their bias and the tail's offset.

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
        """Bytes read to choose the clusters: the centroids and their bias."""
        return self.matrix.nbytes + self.bias.nbytes

    def fits(self, n_clusters: int, hidden_size: int) -> bool:
        """Whether these are centroids for ``n_clusters`` clusters of rows (V, D)."""
        matrix = self.matrix
        width: float = hidden_size
        shapes: list[tuple[mx.array, tuple[float, ...]]] = [
            (self.bias, (n_clusters,)),
            (self.tail_offset, (n_clusters,)),
        ]
        if matrix.scales is not None and matrix.biases is not None:
            width = hidden_size * matrix.bits / 32
            groups = (n_clusters, hidden_size / matrix.group_size)
            shapes += [(matrix.scales, groups), (matrix.biases, groups)]
        shapes.append((matrix.weight, (n_clusters, width)))
        stored_as_words = matrix.weight.dtype == mx.uint32
        return stored_as_words == matrix.quantized and all(a.shape == s for a, s in shapes)
