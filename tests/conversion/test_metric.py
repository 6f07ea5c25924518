"""The distance of two tokens: how differently their logits move."""

import numpy as np
import pytest

from mlx_flashhead.conversion.fitting import FLOOR, logit_metric


def make_states(n_states=3000, hidden_size=24, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((hidden_size, hidden_size))
    states = rng.standard_normal((n_states, hidden_size)) @ mixing + 3
    return states.astype(np.float32)


def test_squared_distances_are_variances_of_differences_of_logits():
    states, rows = make_states(), make_states(40, seed=1)
    metric = logit_metric(states)
    assert metric.dtype == np.float32
    of_logits = np.cov((states @ rows.T).T, bias=True)
    variance = np.diag(of_logits)
    expected = variance[:, None] + variance - 2 * of_logits
    expected /= states.var(axis=0, dtype=np.float64).mean()
    expected += FLOOR * np.square(rows[:, None] - rows).sum(axis=-1)
    found = np.square((rows[:, None] - rows) @ metric).sum(axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


def test_the_scale_of_the_states_does_not_matter():
    states = make_states()
    metric = logit_metric(states)
    for other in (1000 * states, 1e-3 * states):
        found = logit_metric(other)
        np.testing.assert_allclose(found @ found.T, metric @ metric.T, rtol=1e-3, atol=1e-3)


def test_of_many_columns_those_of_the_greatest_variance_are_kept():
    states = np.random.default_rng(0).standard_normal((2000, 480)).astype(np.float32)
    states[:, :5] *= 10
    metric = logit_metric(states)
    assert metric.shape == (480, 80)
    kept = np.square(metric).sum(axis=1)
    np.testing.assert_allclose(kept[:5], 100 * 480 / 975, rtol=0.1)


@pytest.mark.parametrize("n_states", [1, 50])
def test_states_that_are_all_alike_leave_the_distances_as_they_are(n_states):
    metric = logit_metric(np.full((n_states, 8), 2, np.float32))
    np.testing.assert_allclose(metric @ metric.T, FLOOR * np.eye(8), atol=1e-6)
