"""The distance of two tokens: how differently their logits move."""

import numpy as np
import pytest

from mlx_flashhead.conversion.clustering import cluster_rows
from mlx_flashhead.conversion.metric import FLOOR, logit_metric


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


def unexplained(rows, token_ids, states):
    """Share of the logits' variance that the tokens of a cluster do not have in common."""
    logits = states @ rows.T
    groups = logits[:, token_ids.astype(int)]
    apart = groups - groups.mean(axis=-1, keepdims=True)
    return apart.var(axis=0).mean() / logits.var(axis=0).mean()


@pytest.mark.parametrize("seed", range(3))
def test_clusters_follow_what_the_states_see(seed):
    """Rows share a meaning where the states vary, and more of a look where they hardly do.

    Clusters by the rows alone gather looks; in the metric they gather tokens of one meaning, whose
    logits move together over states that were not seen.
    """
    rng = np.random.default_rng(seed)
    n_groups, seen, unseen = 16, 8, 24
    tokens = np.arange(n_groups * 8)
    meaning = rng.normal(size=(n_groups, seen))[tokens % n_groups]
    look = 1.7 * rng.normal(size=(n_groups, unseen))[tokens // 8]
    turned = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    rows = (np.hstack([meaning, look]) @ turned.T).astype(np.float32)
    spread = np.repeat([1.0, 0.17], [seen, unseen])
    states = (rng.normal(size=(4000, 32)) * spread @ turned.T).astype(np.float32)
    known, other = states[:2000], states[2000:]
    by_rows, by_logits = (
        cluster_rows(rows, 8, metric=metric, progress=False)
        for metric in (np.eye(32, dtype=np.float32), logit_metric(known))
    )
    left = unexplained(rows, by_logits, other) / unexplained(rows, by_rows, other)
    assert left < 0.7


@pytest.mark.parametrize("n_states", [1, 50])
def test_states_that_are_all_alike_leave_the_distances_as_they_are(n_states):
    metric = logit_metric(np.full((n_states, 8), 2, np.float32))
    np.testing.assert_allclose(metric @ metric.T, FLOOR * np.eye(8), atol=1e-6)
