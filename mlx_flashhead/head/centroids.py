"""The centroids of the clusters, with their bias and the offset of the tail."""

from dataclasses import dataclass

import mlx.core as mx

from .matrix import Matrix


@dataclass(frozen=True)
class Centroids:
    """Centroids, their bias and the tail's offset."""

    matrix: Matrix  # (C, D), without a bias of its own
    bias: mx.array  # (C,) float32, added to the scores
    tail_offset: mx.array  # (C,) float32, added to a score for the logit of the cluster's tokens

    @property
    def routing_bytes(self) -> int:
        """Bytes read to choose the clusters: the centroids and their bias."""
        return self.matrix.nbytes + self.bias.nbytes

    def fits(self, n_clusters: int, hidden_size: int) -> bool:
        """Whether these are centroids for ``n_clusters`` clusters of rows (V, D)."""
        matrix = self.matrix
        shapes = [self.bias.shape == self.tail_offset.shape == (n_clusters,)]
        width: float = hidden_size
        if matrix.scales is not None and matrix.biases is not None:
            width = hidden_size * matrix.bits / 32
            groups = (n_clusters, hidden_size / matrix.group_size)
            shapes.append(matrix.scales.shape == matrix.biases.shape == groups)
        shapes.append(matrix.weight.shape == (n_clusters, width))
        return all(shapes) and (matrix.weight.dtype == mx.uint32) == matrix.quantized
