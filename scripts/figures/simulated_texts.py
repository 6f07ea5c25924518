"""Texts whose guesses in a row that are right behind each token are known, and their times."""

from collections.abc import Sequence

import numpy as np

from mlx_flashhead.decoding.guessing.depth import MAX_GUESSES, Budget, Costs, Known, Shares


def drawn(shares: Sequence[float], n_tokens: int, seed: int | Sequence[int]) -> np.ndarray:
    """The runs of a text whose drafts are right at random, with a share for each depth."""
    right = np.random.default_rng(seed).random((n_tokens, MAX_GUESSES)) < np.array(shares)
    return np.cumprod(right, axis=1).sum(axis=1)


def time_of_width(runs: np.ndarray, costs: Costs, width: int) -> float:
    """The time of a text in single steps, with steps of one width."""
    n_done = 0
    time = 0.0
    while n_done < len(runs):
        n_right = min(int(runs[n_done]), width - 1)
        time += costs.time(width, float(n_right < width - 1))
        n_done += n_right + 1
    return time


def time_of_policy(runs: np.ndarray, costs: Costs, known: Known) -> float:
    """The time of a text in single steps, as the policy chooses them."""
    shares = Shares(known.shares)
    budget = Budget(known)
    n_done = 0
    time = 0.0
    while n_done < len(runs):
        width = budget.width(shares.chances, costs)
        n_right = min(int(runs[n_done]), width - 1)
        time += costs.time(width, float(n_right < width - 1))
        budget.note(width, costs, n_right)
        if width > 1:
            shares.note(width - 1, n_right)
        n_done += n_right + 1
    shares.leave_to(known)
    return time
