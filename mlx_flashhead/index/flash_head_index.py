"""A FlashHead without its rows, and whether it serves other rows."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..common.tables import percent
from ..head.clustered import Centroids
from ..head.matrix import Matrix, as_float32
from .flash_head_config import FlashHeadConfig

# An index serves other rows that are as near: most fine-tunes, and other precisions of its own rows
# (docs/quality.md).
MIN_COSINE = 0.94
MAX_LENGTH_CHANGE = 0.05


@dataclass(frozen=True)
class Sketch:
    """Evenly spaced rows of a head, independent of their format.

    Attributes:
        directions: The rows (64, D) float16, scaled to length 1.
        lengths: Their lengths (64,) float32.
    """

    directions: mx.array
    lengths: mx.array

    @classmethod
    def of(cls, rows: Matrix) -> "Sketch":
        """The sketch of rows (V, D)."""
        sample = as_float32(rows.sample().dequantized(mx.float32))
        lengths = np.linalg.norm(sample, axis=1)
        directions = sample / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
        return cls(mx.array(directions.astype(np.float16)), mx.array(lengths))

    def likeness(self, rows: Matrix) -> tuple[float, float]:
        """Compares with other rows.

        Args:
            rows: Rows of the same shape (V, D).

        Returns:
            The mean cosine of the rows, and the median change of their lengths, as a share.
        """
        other = Sketch.of(rows)
        cosines = (as_float32(self.directions) * as_float32(other.directions)).sum(axis=1)
        lengths = np.stack([self.lengths, other.lengths])
        longer = lengths.max(axis=0)
        # Rows of zeros have no direction.
        there = longer > 0
        if not there.any():
            return 1.0, 0.0
        change = np.ptp(lengths, axis=0)[there] / longer[there]
        return float(cosines[there].mean()), float(np.median(change))


@dataclass(frozen=True)
class FlashHeadIndex:
    """A FlashHead without its rows.

    Attributes:
        config: Its settings.
        token_ids: The tokens of the clusters (C, cluster_size) uint32, V in padded slots.
        centroids: The clusters' centroids.
        sketch: Of its own rows.
    """

    config: FlashHeadConfig
    token_ids: np.ndarray
    centroids: Centroids
    sketch: Sketch

    def check_fit(self, rows: Matrix, source: str) -> str | None:
        """Compares with the rows of a model.

        Args:
            rows: The model's rows (V, D).
            source: Where this index is, for messages.

        Returns:
            None if they are its own rows, a sentence if they are near.

        Raises:
            ValueError: If they are other rows.
        """
        remedy = "give the one made for this model, or leave it out and one is found or built"
        n_rows = self.config.vocab_size
        width = self.sketch.directions.shape[1]
        if (rows.n_rows, rows.hidden_size) != (n_rows, width):
            raise ValueError(
                f"The FlashHead in {source} is for {n_rows} tokens of width {width}, but the model "
                f"has {rows.n_rows} of width {rows.hidden_size}: {remedy}."
            )
        if rows.fingerprint == self.config.fingerprint:
            return None
        cosine, length_change = self.sketch.likeness(rows)
        figures = f"mean cosine {cosine:.3f}, lengths {percent(length_change, 1)} apart"
        if cosine < MIN_COSINE or length_change > MAX_LENGTH_CHANGE:
            raise ValueError(
                f"The FlashHead in {source} belongs to other rows than this model's ({figures}): "
                f"{remedy}."
            )
        return (
            f"The FlashHead in {source} was made from another form of these rows ({figures}): used "
            "as it is."
        )
