"""What a FlashHead must compute, in numpy float64, written from the formulas alone."""

import mlx.core as mx
import numpy as np

# Half a unit in the last place, relative, of the dtype of the logits.
ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def float64(array: mx.array) -> np.ndarray:
    """The array's values, exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weight64(stored) -> np.ndarray:
    """The weight of a Matrix, dequantised without rounding."""
    if stored.scales is None:
        return float64(stored.weight)
    scales, biases = stored.scales, stored.biases
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return float64(mx.dequantize(stored.weight, scales, biases, **stored.quantization))


class Reference:
    """A head of rows, token_ids (C, n), centroids and always scored tokens.

    Attributes:
        logits: (R, V) dense logits of the states.
        scores: (R, C) of stage 1, infinite for the clusters that are always scored.
    """

    def __init__(self, rows, token_ids, centroids, eos_token_ids, hidden: mx.array):
        self.vocab_size, self.token_ids = rows.n_rows, token_ids
        states = float64(hidden).reshape(-1, hidden.shape[-1])
        self.logits = states @ weight64(rows).T
        if rows.bias is not None:
            self.logits = self.logits + float64(rows.bias)
        self.estimates = states @ weight64(centroids.matrix).T + float64(centroids.bias)
        forced = np.isin(token_ids, list(eos_token_ids)).any(axis=1)
        self.scores = np.where(forced, np.inf, self.estimates)
        self.tail_offset = float64(centroids.tail_offset)
        self.cluster_of = np.empty(self.vocab_size, dtype=int)
        for cluster, ids in enumerate(token_ids):
            self.cluster_of[ids[ids < self.vocab_size]] = cluster

    def is_a_best_choice(self, row: int, clusters: set[int], tolerance: float) -> bool:
        """Whether no other cluster scores higher than one of ``clusters``, within ``tolerance``."""
        others = np.delete(self.scores[row], list(clusters))
        return not len(others) or self.scores[row, list(clusters)].min() >= others.max() - tolerance

    def expanded(self, row: int, clusters: set[int]) -> np.ndarray:
        """(V,) logits when ``clusters`` are scored: the others get the mean of a log-normal."""
        scored = np.isin(self.cluster_of, list(clusters))
        best = self.logits[row, scored].max()
        cap = best - max(1.0, abs(best) / 64)
        # a cluster that is always scored, but was not, counts as certain: it gets the cap
        tail = np.minimum(self.scores[row] + self.tail_offset, cap)
        return np.where(scored, self.logits[row], tail[self.cluster_of])
