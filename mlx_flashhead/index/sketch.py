"""A few rows of a head, which show whether other rows are near enough for an index.

An index serves every precision of its rows almost as well as its own, and most fine-tunes. With the
check it costs speed alone. docs/quality.md has the likeness of rounded and of noisy rows. Expected
bytes per token when verified, relative to dense, of SmolLM2-135M with the index of other rows:
0.883 with its own, 0.904 at 3 bits (mean cosine 0.973), 0.914 at 0.886, and 1.487 at 2 bits (0.884,
lengths 6 % apart).
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..head.matrix import Matrix, as_float32

MIN_COSINE, MAX_LENGTH_CHANGE = 0.94, 0.05  # of rows that an index of others serves


class Likeness(NamedTuple):
    """The likeness of a model's rows to those of a sketch."""

    cosine: float  # mean, of a row with its counterpart
    length_change: float  # median, as a share of the row's length


@dataclass(frozen=True)
class Sketch:
    """Evenly spaced rows of a head, independent of their format."""

    directions: mx.array  # (64, D) float16, of length 1
    lengths: mx.array  # (64,) float32

    @classmethod
    def of(cls, rows: Matrix) -> "Sketch":
        """The sketch of a head's rows."""
        sample = as_float32(rows.sample().dequantized(mx.float32))
        lengths = np.linalg.norm(sample, axis=1)
        directions = sample / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
        return cls(mx.array(directions.astype(np.float16)), mx.array(lengths))

    def fits(self, hidden_size: int) -> bool:
        """Whether the arrays fit rows of that width."""
        return (
            self.directions.shape == (self.lengths.size, hidden_size)
            and self.lengths.ndim == 1
            and self.directions.dtype == mx.float16
            and self.lengths.dtype == mx.float32
        )

    def likeness(self, rows: Matrix) -> Likeness:
        """Compares with rows of the same shape (V, D)."""
        other = Sketch.of(rows)
        cosines = (as_float32(self.directions) * as_float32(other.directions)).sum(axis=1)
        mine, theirs = np.array(self.lengths), np.array(other.lengths)
        longer = np.maximum(mine, theirs)
        there = longer > 0  # rows of zeros have no direction
        if not there.any():
            return Likeness(1.0, 0.0)
        change = np.abs(theirs - mine)[there] / longer[there]
        return Likeness(float(cosines[there].mean()), float(np.median(change)))
