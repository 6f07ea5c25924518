"""The distance of two tokens, by how differently their logits move over hidden states.

|(x - y) L|² = variance over the states h of h · (x - y)      L Lᵀ = covariance of the states
"""

import numpy as np

BLOCK_STATES = 2048  # at once, which bounds memory
# Variance added in all directions, as a share of the mean variance. 0.03 to 0.3 make no difference.
FLOOR = 0.1
COLUMNS_SHARE, LEAST_COLUMNS = 1 / 6, 64  # of D; a third or all of them make no difference


def covariance(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of states (N, D), in float64."""
    mean = states.mean(axis=0, dtype=np.float64)
    total = np.zeros((states.shape[1], states.shape[1]))
    for start in range(0, len(states), BLOCK_STATES):
        centred = (states[start : start + BLOCK_STATES] - mean).astype(np.float32)
        total += centred.T @ centred
    return mean, total / len(states)


def logit_metric(states: np.ndarray) -> np.ndarray:
    """The matrix L (D, d) float32 by which rows are multiplied so that distances are in this
    metric.

    Its columns are the d directions in which the states (N, D) vary most, each scaled by its root.
    The mean variance of the states is scaled to 1. Equal states give the rows' own distances.
    """
    hidden_size = states.shape[1]
    _, variance = covariance(states)
    mean_variance = np.trace(variance) / hidden_size
    if mean_variance > 0:
        variance = variance / mean_variance
    values, directions = np.linalg.eigh(variance)
    n_columns = min(hidden_size, max(LEAST_COLUMNS, round(COLUMNS_SHARE * hidden_size)))
    greatest = slice(-n_columns, None)
    scales = np.sqrt(np.maximum(values[greatest], 0) + FLOOR)
    return (directions[:, greatest] * scales).astype(np.float32)
