"""How many probes: the fewest that reach the goals with confidence."""

from itertools import pairwise

import numpy as np
import pytest

from mlx_flashhead.conversion import probes
from mlx_flashhead.conversion.differences import StepBytes
from mlx_flashhead.conversion.measures import AGREEMENT, KL, PositionMeasures
from mlx_flashhead.conversion.probes import choose_probes, lower_bound, probe_grid

GRID = [8, 16, 32, 64]


def choose(agreement_goal, kl_goal, *, agree=(1, 1, 1, 1), kl=(0, 0, 0, 0), n_positions=1000):
    """The choice, if these shares of the positions agree, and the mean KL is this."""
    values = np.zeros((4, 7, n_positions), np.float32)
    for of_probes, share, mean in zip(values, agree, kl, strict=True):
        of_probes[AGREEMENT] = np.arange(n_positions) < round(share * n_positions)
        of_probes[KL] = mean
    found = PositionMeasures(GRID, values, np.zeros(n_positions))
    return choose_probes(found, agreement_goal, kl_goal, StepBytes(0, 1.0, 1000), 3072)


def test_the_fewest_that_reach_both_goals():
    # 1,000 positions: 90 % and 1.645 standard errors of 0.95 points are 91.6 %
    assert choose(0.9, 1.0, agree=(0.5, 0.91, 0.917, 1))[0] == 32
    # the KL of unseen text is taken as twice as much
    assert choose(0.5, 0.1, kl=(0.2, 0.051, 0.049, 0.01))[0] == 32
    assert choose(0.9, 0.1, agree=(0.5, 0.5, 1, 1), kl=(0.01, 0.01, 0.5, 0.01))[0] == 64


@pytest.mark.parametrize(("share", "n_probes"), [(0.04, 32), (0.001, 8), (1, 64)])
def test_no_more_than_may_be_read_unless_the_first_is_too_much(share, n_probes, monkeypatch):
    monkeypatch.setattr(probes, "MOST_BYTES", share)
    assert choose(0.5, 0.1, kl=(1, 1, 1, 1))[0] == n_probes


@pytest.mark.parametrize("n_positions", [1, 100, 1300])
def test_few_positions_that_cannot_show_a_goal_must_all_agree(n_positions):
    assert choose(0.998, 1.0, n_positions=n_positions)[0] == 8
    missed = 1 - 1 / n_positions
    assert choose(0.998, 1.0, agree=(missed, missed, 1, 1), n_positions=n_positions)[0] == 32


def test_the_words_are_what_the_rule_asks(monkeypatch):
    assert choose(0.5, 0.03)[1] == (
        "8 of 3,072 clusters per token are the fewest that reach 50 % agreement and a KL of "
        "0.015 nats on held-out text."
    )
    monkeypatch.setattr(probes, "MOST_BYTES", 0.02)
    # 99 of 100 are more than 98 %, but cannot show it
    few = choose(0.98, 0.03, agree=(0.99,) * 4, kl=(0.02,) * 4, n_positions=100)
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
