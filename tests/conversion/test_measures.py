"""The numbers of probes that follow from measures on held-out states, and the risks."""

from itertools import pairwise

import numpy as np
import pytest

from mlx_flashhead.conversion import measures, probes

GRID = [8, 16, 32, 64]
NBYTES = probes.BytesRead(centroids=50, probe=1.0, dense=1000, body=500)


def choose(goal, *, agree=(1, 1, 1, 1), n_positions=1000):
    """The choice without verification, if these shares of the positions agree."""
    values = np.zeros((4, 7, n_positions), np.float32)
    for measured, share in zip(values, agree, strict=True):
        measured[measures.AGREEMENT] = np.arange(n_positions) < round(share * n_positions)
    found = measures.PositionMeasures(GRID, values, dense_perplexity=1.0)
    return probes.choose_unverified(found, goal, probes.BytesRead(0, 1.0, 1000))


def test_the_fewest_that_agree_as_often_as_wanted(monkeypatch):
    # 1,000 positions: 90 % and 1.645 standard errors of 0.95 points are 91.6 %
    assert choose(0.9, agree=(0.5, 0.91, 0.917, 1)) == 32
    # So few that cannot show a goal must all agree.
    for n_positions in (1, 100, 1300):
        missed = 1 - 1 / n_positions
        assert choose(0.998, agree=(missed, missed, 1, 1), n_positions=n_positions) == 32
    # No more than may be read, unless the first is too much.
    for share, n_probes in ((0.04, 32), (0.001, 8), (1, 64)):
        monkeypatch.setattr(probes, "MAX_BYTES", share)
        assert choose(0.5, agree=(0, 0, 0, 0)) == n_probes


def test_grid():
    grid = probes.measured_probes(16_384, allowing(3072))
    assert grid[:3] == [8, 16, 24]
    assert grid[-2] < 3072 <= grid[-1]
    for fewer, more in pairwise(grid):
        assert more % 8 == 0
        assert more - fewer == 8 or more <= 1.16 * fewer
    assert probes.measured_probes(13, allowing(100)) == [8, 13]
    assert probes.measured_probes(13, allowing(100), 10) == [8, 10, 13]
    assert probes.measured_probes(13, allowing(-1)) == [8]


def allowing(n_probes):
    """Bytes of which so many probes may be read."""
    return probes.BytesRead(centroids=0, probe=1.0, dense=n_probes / probes.MAX_BYTES)


def differing(greedy, sampled, n_positions=1000):
    """Measures in which these shares of the proposals differ, by number of probes."""
    rng = np.random.default_rng(0)
    values = np.zeros((len(greedy), 7, n_positions), np.float32)
    for measured, greedy_share, sampled_share in zip(values, greedy, sampled, strict=True):
        measured[measures.AGREEMENT] = np.arange(n_positions) >= greedy_share * n_positions
        measured[measures.MASS] = 1 - sampled_share
        measured[measures.GAP] = rng.exponential(3, n_positions)
        measured[measures.TAIL] = np.log(sampled_share / 2)
    counts = [10 * 2**i for i in range(len(greedy))]
    return measures.PositionMeasures(counts, values, dense_perplexity=1.0)


def settings(greedy, sampled, nbytes=NBYTES, n_positions=1000):
    found = differing(greedy, sampled, n_positions)
    n_probes = probes.choose_verified(found, nbytes)
    return probes.verification_settings(found, n_probes) | {"n_probes": n_probes}


def test_a_verification_costs_the_dense_rows_and_a_difference_the_steps_after_it():
    # Never a difference: 32 positions per verification.
    assert NBYTES.verified(100, 0.0) == pytest.approx(650 + 1000 / 32)
    k = np.sqrt(2 * 1000 / (0.05 * 650))
    by_hand = 650 * (1 + 0.05 * (k + 1) / 2) + 1000 / k
    assert NBYTES.verified(100, 0.05) == pytest.approx(by_hand)
    # Always one: a verification per token.
    assert NBYTES.verified(100, 1.0) >= 650 + 1000


GREEDY = [0.1, 0.02, 0.002, 0.001]
SAMPLED = [0.2, 0.04, 0.004, 0.003]


def test_probes_are_those_of_the_fewest_bytes():
    found = settings(GREEDY, SAMPLED)
    shares = np.mean([GREEDY, SAMPLED], axis=0)
    by_hand = [NBYTES.verified(10 * 2**i, share) for i, share in enumerate(shares)]
    measured = differing(GREEDY, SAMPLED)
    expected = [probes.expected_bytes(measured, 10 * 2**i, NBYTES) for i in range(len(GREEDY))]
    assert expected == pytest.approx(by_hand, rel=1e-6)
    assert found["n_probes"] == 10 * 2 ** int(np.argmin(by_hand))
    # A step that reads much more beside the rows pays for more of them.
    heavy = probes.BytesRead(centroids=50, probe=1.0, dense=1000, body=50_000)
    assert settings(GREEDY, SAMPLED, heavy)["n_probes"] > found["n_probes"]
    for name, expected in (("greedy_differs", GREEDY), ("sampled_differs", SAMPLED)):
        assert [row[name] for row in found["by_probes"]] == pytest.approx(expected, abs=1e-6)
    # The scale makes the estimated tails right, which are half of them here.
    assert found["risk"]["sampled"] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(("offset", "slope"), [(0.0, 1.0), (-1.0, 0.6), (0.5, 1.6)])
def test_the_risk_of_a_greedy_proposal_is_the_one_that_differences_came_from(offset, slope):
    rng = np.random.default_rng(1)
    gaps = rng.uniform(-1, 12, 40_000)
    differs = rng.random(len(gaps)) < np.minimum(1, np.exp(offset - slope * gaps))
    found = probes.fit_greedy_risk(gaps, differs)
    assert found == pytest.approx((offset, slope), abs=0.15)


@pytest.mark.parametrize("n_different", [0, 3])
def test_few_differences_leave_the_slope_near_that_of_a_perfect_estimate(n_different):
    """And none at all, without an unscored cluster, the usual risk."""
    gaps = np.random.default_rng(2).uniform(1, 15, 1000)
    offset, slope = probes.fit_greedy_risk(np.sort(gaps), np.arange(1000) < n_different)
    assert 0.5 < slope < 2.5
    risks = np.minimum(1, np.exp(offset - slope * gaps))
    assert risks.sum() == pytest.approx(n_different + 0.5, abs=0.01)
    assert probes.fit_greedy_risk(np.empty(0), np.empty(0, bool)) == (0.0, 1.0)
