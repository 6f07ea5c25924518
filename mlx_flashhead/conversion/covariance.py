"""The spread of hidden states, and the metric that it makes of logits."""

import numpy as np

BLOCK_STATES = 2048  # at once, which bounds memory
FLOOR = 0.1  # of the variance in all directions, of its mean; 0.03 to 0.3 make no difference
COLUMNS_SHARE = 1 / 6  # of D; a third or all of them make no difference
LEAST_COLUMNS = 64

Array = np.ndarray


def covariance(states: Array) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of states (N, D), in float64."""
    mean = states.mean(axis=0, dtype=np.float64)
    total = np.zeros((states.shape[1], states.shape[1]))
    for start in range(0, len(states), BLOCK_STATES):
        centred = (states[start : start + BLOCK_STATES] - mean).astype(np.float32)
        total += centred.T @ centred
    return mean, total / len(states)


def logit_metric(states: Array) -> Array:
    """The metric in which rows of a head are near if their logits are.

    Args:
        states: Hidden states h (N, D).

    Returns:
        A matrix L (D, d) float32 that multiplies rows x, so that |(x - y) L|² is the variance of
        h · (x - y) over the states, scaled to a mean of 1. It has the directions of most variance.
    """
    hidden_size = states.shape[1]
    _, variance = covariance(states)
    mean_variance = np.trace(variance) / hidden_size
    if mean_variance > 0:
        variance = variance / mean_variance
    values, directions = np.linalg.eigh(variance)
    n_columns = min(hidden_size, max(LEAST_COLUMNS, round(COLUMNS_SHARE * hidden_size)))
    scales = np.sqrt(np.maximum(values[-n_columns:], 0) + FLOOR)
    return (directions[:, -n_columns:] * scales).astype(np.float32)
