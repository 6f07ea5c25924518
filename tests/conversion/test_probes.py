"""How many probes: the fewest that reach the goals with confidence."""

from itertools import pairwise

import numpy as np
import pytest

from mlx_flashhead.conversion.measures import AGREEMENT, KL, PositionMeasures
from mlx_flashhead.conversion.probes import (
    Goals,
    choose_probes,
    lower_bound,
    probe_grid,
)

GRID = [8, 16, 32, 64]


def found_with(agree=None, kl=None, n_positions=100, grid=GRID):
    """Measures of one routing, (P, N) each; what is not given is reached by all."""
    found = PositionMeasures(grid, n_positions, known=True)
    found.values[:, AGREEMENT] = 1.0 if agree is None else agree
    found.values[:, KL] = 0.0 if kl is None else kl
    return found


def choose(found, goals):
    return choose_probes(found, goals, lambda n_probes: n_probes / 1000, 3072)


def flags(*shares, n_positions=1000):
    """(P, N) 0 or 1: of each row, a share of ones."""
    return np.stack([np.arange(n_positions) < share * n_positions for share in shares])


def test_the_fewest_that_reach_the_agreement_with_confidence():
    # 1,000 positions: 90 % and 1.645 standard errors of 0.95 points are 91.6 %
    agree = flags(0.5, 0.91, 0.917, 1.0)
    assert choose(found_with(agree, n_positions=1000), Goals(0.9, 1.0))[0] == 32


def test_the_kl_of_unseen_text_is_taken_as_twice_as_much():
    kl = np.array([[0.2], [0.051], [0.049], [0.01]]) * np.ones((1, 1000))
    assert choose(found_with(kl=kl, n_positions=1000), Goals(0.5, 0.1))[0] == 32


def test_both_goals_must_be_reached():
    kl = np.array([[0.01], [0.01], [0.5], [0.01]]) * np.ones((1, 1000))
    agree = flags(0.5, 0.5, 1.0, 1.0)
    assert choose(found_with(agree, kl, n_positions=1000), Goals(0.9, 0.1))[0] == 64


def test_no_more_than_may_be_read_unless_the_first_is_too_much_already():
    found = found_with(kl=1.0)
    assert choose(found, Goals(0.5, 0.1, bytes_share=0.04))[0] == 32
    assert choose(found, Goals(0.5, 0.1, bytes_share=0.001))[0] == 8
    assert choose(found, Goals(0.5, 0.1, bytes_share=1))[0] == 64


@pytest.mark.parametrize("n_positions", [1, 100, 1300])
def test_few_positions_that_cannot_show_a_goal_must_all_agree(n_positions):
    agree = np.ones((4, n_positions))
    assert choose(found_with(agree, n_positions=n_positions), Goals(0.998, 1.0))[0] == 8
    agree[:2, 0] = 0
    assert choose(found_with(agree, n_positions=n_positions), Goals(0.998, 1.0))[0] == 32


def test_the_words_are_what_the_rule_asks():
    assert choose(found_with(), Goals(0.5, 0.03))[1] == (
        "8 of 3,072 clusters per token are the fewest that reach 50 % agreement and a KL of "
        "0.015 nats on held-out text."
    )
    # 99 of 100 are more than 98 %, but cannot show it
    limited = Goals(0.98, 0.03, bytes_share=0.02)
    few = choose(found_with(flags(0.99, 0.99, 0.99, 0.99, n_positions=100), kl=0.02), limited)
    assert few[1] == (
        "16 of 3,072 clusters per token are too few to be sure of 98 % agreement and a KL of 0.015 "
        "nats on held-out text. More would read over 2 % of the dense head's bytes."
    )


def test_bounds():
    bound = lower_bound(0.9, 400)
    # Wilson: the share whose own standard error reaches to what was seen
    assert bound + 1.645 * np.sqrt(bound * (1 - bound) / 400) == pytest.approx(0.9)


def test_grid():
    grid = probe_grid(16_384, 3072)
    assert grid[:3] == [8, 16, 24]
    assert all(n_probes % 8 == 0 for n_probes in grid)
    assert all(b - a == 8 or b <= 1.16 * a for a, b in pairwise(grid))
    assert grid[-2] < 3072 <= grid[-1]
    assert probe_grid(13, 100) == [8, 13]
    assert probe_grid(3, 1) == [3]
