"""What holds for all logits within bounds."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.head.draws.bounds import Interval, log_mass
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.filters import cuts, surely_kept, threshold
from mlx_flashhead.head.draws.noise import Noise

SETTINGS = [
    Noise(1.0, top_p=0.9),
    Noise(1.0, top_p=0.5),
    Noise(1.0, min_p=0.1),
    Noise(1.0, top_k=4),
    Noise(1.0, top_p=0.95, min_p=0.02, top_k=6),
    Noise(1.0),
]


def surely(logits, off, settings):
    draws = Draws.of([(settings, (0, 0))])
    low = mx.array((logits - off)[None].astype(np.float32))
    high = mx.array((logits + off)[None].astype(np.float32))
    return np.array(surely_kept(low, high, draws, threshold(high, draws, log_mass(low) - 1e-4)))[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_surely_kept_is_kept_for_all_logits(settings):
    rng = np.random.default_rng(5)
    draws = Draws.of([(settings, (0, 0))])
    n_found = 0
    n_always = 0
    for _ in range(60):
        logits = np.round(rng.normal(scale=2, size=12), rng.integers(1, 6))
        off = rng.choice([0.0, 1e-4, 0.05, 0.5]) * rng.uniform(0.5, 1, size=12)
        found = surely(logits, off, settings)
        always = np.ones(12, bool)
        for i in range(40):
            # They are anywhere within the bounds, and at their ends.
            if i % 2:
                sign = rng.uniform(-1, 1, 12)
            else:
                sign = rng.choice([-1.0, 1.0], 12)
            truth = mx.array((logits + sign * off)[None].astype(np.float32))
            always &= np.array(truth >= threshold(truth, draws))[0]
        assert not (found & ~always).any()
        n_found += found.sum()
        n_always += always.sum()
    assert n_found > 0.7 * n_always


@pytest.mark.parametrize(
    "off, kept",
    [
        # The third is at the cut: 0.8 of the mass are above it.
        (1e-5, [True, True, True, False]),
        (0.04, [True, True, True, False]),
        # More than 0.9 may be above the third.
        (0.2, [True, True, False, False]),
    ],
)
def test_the_token_at_the_cut_is_kept_if_no_other_comes_between(off, kept):
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert surely(logits, np.full(4, off), SETTINGS[0]).tolist() == kept


def test_one_of_equals_at_the_cut_may_be_left_out():
    """Of the two last ones either may come first, and then 0.95 of the mass are above the other."""
    logits = np.log([0.6, 0.2, 0.1, 0.1])
    found = surely(logits, np.full(4, 1e-3), Noise(1.0, top_p=0.89))
    assert found.tolist() == [True, True, False, False]


def test_a_token_at_the_cut_of_min_p_may_fall_below_it():
    """That cut is no token's: it rises with the best logit."""
    draws = Draws.of([(Noise(1.0, min_p=0.5), (0, 0))])
    best = mx.array([[0.1]])
    high = mx.concatenate([best, best + draws.log_min_p], axis=-1)
    found = surely_kept(high - 0.2, high, draws, threshold(high, draws, log_mass(high)))
    assert found.tolist() == [[True, False]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logits_that_are_equally_far_off_have_the_same_cuts(settings):
    """They are sorted once; others are sorted as the highest and as the lowest ones."""
    rng = np.random.default_rng(7)
    logits = mx.array(rng.normal(scale=3, size=(5, 40)), mx.float32)
    off = mx.array(rng.uniform(0, 0.3, size=(5, 1)), mx.float32)
    draws = Draws.of([(settings, (0, 0))] * 5)
    even = Interval(logits, off)
    mass = log_mass(logits)
    found = cuts(even, draws, mass - off - 0.01, mass + off + 0.02)
    each = Interval(logits, mx.broadcast_to(off, logits.shape))
    expected = cuts(each, draws, mass - off - 0.01, mass + off + 0.02)
    for one, other in zip(found, expected, strict=True):
        assert mx.array_equal(one, other) or mx.allclose(one, other, rtol=1e-6)
    assert mx.all(found[0] >= found[1])


@pytest.mark.parametrize("top_p", [0.79, 0.8 - 5e-5, 0.8 + 5e-5, 0.81])
def test_cuts_are_apart_where_sums_may_be_rounded(top_p):
    """The sum of two of three known probabilities is 0.8, or a ten thousandth more or less."""
    logits = mx.log(mx.array([[0.5, 0.3, 0.2]]))
    draws = Draws.of([(Noise(1.0, top_p=top_p), (0, 0))])
    known = Interval(logits, mx.zeros((1, 1)))
    mass = log_mass(logits)
    high, low = cuts(known, draws, mass, mass)
    # The places of the lowest logits that are kept.
    of_high = 2 if top_p > 0.805 else 1
    of_low = 1 if top_p < 0.795 else 2
    assert high.item() == logits[0, of_high].item()
    assert low.item() == logits[0, of_low].item()


def test_evened_logits_are_as_far_off_as_the_farthest():
    logits = mx.array([[1.0, 2.0, mx.finfo(mx.float32).min]])
    evened = Interval(logits, mx.array([[0.1, 0.3, mx.inf]])).evenly()
    assert evened.even and evened.off.tolist() == [[mx.array(0.3).item()]]


@pytest.mark.parametrize("off, of_others", [(0.1, 0.3), (0.3, 0.1)])
def test_even_logits_beside_others_are_as_far_off_as_the_farther_ones(off, of_others):
    first = Interval(mx.array([[1.0, 2.0]]), mx.array([[off]]))
    others = Interval(mx.array([[3.0]]), mx.array([[of_others]]))
    both = first.beside(others)
    assert both.even and both.logits.tolist() == [[1.0, 2.0, 3.0]]
    assert both.off.item() == mx.array(0.3).item()


def test_weights_of_even_logits_are_those_of_their_bounds():
    rng = np.random.default_rng(8)
    logits = mx.array(rng.normal(scale=5, size=(4, 60)), mx.float32)
    off = mx.array(rng.uniform(0, 0.2, size=(4, 1)), mx.float32)
    best = mx.max(logits, axis=-1, keepdims=True)
    scale = mx.array([[0.5], [1.0], [1.4], [3.0]])
    even = Interval(logits, off).weights(best, scale)
    each = Interval(logits, mx.broadcast_to(off, logits.shape)).weights(best, scale)
    for one, other in zip(even, each, strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-12)
    assert mx.all(even[0] <= even[1])


@pytest.mark.parametrize("off", [[[0.25]], [[0.0, 0.25, 0.125]]])
def test_masses_are_those_of_the_lowest_and_the_highest_logits(off):
    logits = Interval(mx.array([[1.0, 2.0, -3.0]]), mx.array(off))
    least, most = logits.masses(logits.mass)
    np.testing.assert_allclose(least, log_mass(logits.low), rtol=1e-6)
    np.testing.assert_allclose(most, log_mass(logits.high), rtol=1e-6)
