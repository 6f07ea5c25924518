"""Centroids, their quantized form, and the metric of clusters, against plain numpy."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion import centroids, run_task
from mlx_flashhead.conversion.centroids import FLOOR, fit_centroids, logit_metric
from mlx_flashhead.head.matrix import Matrix
from tiny_models import random_clusters


def make_case(vocab_size=203, hidden_size=64, cluster_size=8, n_states=300):
    """Rows, clusters, states that are neither centred nor isotropic, and a head's bias."""
    rng = np.random.default_rng(0)
    rows = rng.normal(scale=0.3, size=(vocab_size, hidden_size)).astype(np.float32)
    token_ids = random_clusters(rng, vocab_size, cluster_size)
    mixing = rng.normal(size=(hidden_size, hidden_size)) * 0.9 ** np.arange(hidden_size)
    states = rng.normal(size=(n_states, hidden_size)) @ mixing.T / 4 + rng.normal(size=hidden_size)
    head_bias = rng.normal(size=vocab_size).astype(np.float32)
    return rows, token_ids, states.astype(np.float32), head_bias


def members(token_ids, vocab_size):
    return [[i for i in ids if i < vocab_size] for ids in token_ids.tolist()]


def targets(rows, token_ids, states, head_bias):
    """T (N, C): each cluster's logsumexp."""
    logits = states.astype(np.float64) @ rows.T.astype(np.float64) + head_bias
    clusters = members(token_ids, len(rows))
    return np.stack([np.log(np.exp(logits[:, ids]).sum(axis=1)) for ids in clusters], axis=1)


def dequantized(centroids):
    return np.array(centroids.matrix.dequantized(mx.float32), dtype=np.float64)


def fit(*args, **kwargs):
    return run_task(fit_centroids(*args, **kwargs))


CASES = [
    {},
    {"vocab_size": 37, "cluster_size": 5, "hidden_size": 32, "n_states": 20},
    {"vocab_size": 40, "cluster_size": 1},
    {"vocab_size": 1100, "cluster_size": 8, "hidden_size": 32, "n_states": 2500},
]


@pytest.mark.parametrize(
    ("case", "with_bias"),
    [(CASES[0], False), (CASES[1], True), (CASES[2], False), (CASES[3], True)],
)
def test_fit_is_the_ridge_regression_of_the_logsumexp(case, with_bias):
    rows, token_ids, states, head_bias = make_case(**case)
    rows = rows[:, :-1].copy()
    # This width fits no group.
    states = states[:, :-1].copy()
    n_states, hidden_size = states.shape
    if with_bias:
        fitted = fit(rows, token_ids, states, head_bias=head_bias)
        target = targets(rows, token_ids, states, head_bias)
    else:
        fitted = fit(rows, token_ids, states, head_bias=None)
        target = targets(rows, token_ids, states, 0)
    assert fitted.matrix.format.bits == 16
    assert fitted.matrix.weight.dtype == mx.float16

    # The bias column is not penalised: it is solved for by an augmented system of its own.
    means = np.stack([rows[ids].mean(axis=0) for ids in members(token_ids, len(rows))])
    residual = target - states @ means.T
    wide = np.concatenate([states, np.ones((n_states, 1))], axis=1).astype(np.float64)
    penalty = np.eye(hidden_size + 1) * 0.03 * np.trace(np.cov(states.T, bias=True)) / hidden_size
    penalty[-1, -1] = 0
    delta = np.linalg.solve(wide.T @ wide / n_states + penalty, wide.T @ residual / n_states)
    expected = means + delta[:-1].T
    np.testing.assert_allclose(dequantized(fitted), expected, atol=2e-4, rtol=1e-3)

    n_tokens = np.array([len(ids) for ids in members(token_ids, len(rows))])
    np.testing.assert_allclose(np.array(fitted.tail_offset), -np.log(n_tokens), atol=1e-6)


@pytest.mark.parametrize("case", CASES[:2])
def test_bias_belongs_to_the_rounded_centroids(case):
    rows, token_ids, states, head_bias = make_case(**case)
    fitted = fit(rows, token_ids, states, head_bias=head_bias, group_size=32)
    left = targets(rows, token_ids, states, head_bias) - states @ dequantized(fitted).T
    bias = left.mean(axis=0) + left.var(axis=0) / 2
    np.testing.assert_allclose(np.array(fitted.bias), bias, atol=3e-3)
    assert fitted.bias.dtype == fitted.tail_offset.dtype == mx.float32
    assert (fitted.matrix.bits, fitted.matrix.group_size) == (4, 32)
    assert fitted.matrix.scales.dtype == mx.float16


def test_without_states_the_means_remain():
    rows, token_ids, _, head_bias = make_case()
    fitted = fit(rows, token_ids, head_bias=head_bias)
    clusters = members(token_ids, len(rows))
    row_means = [rows[ids].mean(axis=0) for ids in clusters]
    bias_means = [head_bias[ids].mean() for ids in clusters]
    off = np.abs(dequantized(fitted) - row_means).max()
    assert off < 0.51 * np.ptp(row_means, axis=1).max() / 15
    np.testing.assert_allclose(np.array(fitted.bias), bias_means, atol=1e-6)
    np.testing.assert_array_equal(np.array(fitted.tail_offset), 0)


def test_errors_fed_forward_cost_less_where_the_states_are():
    rows, _, states, _ = make_case(vocab_size=400, n_states=2000)
    covariance = np.cov(states.T.astype(np.float64), bias=True)
    matrix, rounded = run_task(centroids._quantize(rows, covariance, 64))
    np.testing.assert_allclose(np.array(matrix.dequantized(mx.float32)), rounded, atol=1e-6)
    plain = np.array(Matrix(mx.array(rows)).quantize(bits=4, group_size=64).dequantized())

    def cost(changed):
        return np.einsum("cd,de,ce->", changed - rows, covariance, changed - rows)

    assert cost(rounded) < 0.5 * cost(plain)


def test_squared_distances_are_variances_of_differences_of_logits():
    rows, _, states, _ = make_case(vocab_size=40, hidden_size=24, n_states=3000)
    metric = logit_metric(states)
    assert metric.dtype == np.float32
    logit_covariance = np.cov((states @ rows.T).T, bias=True)
    variance = np.diag(logit_covariance)
    expected = variance[:, None] + variance - 2 * logit_covariance
    expected /= states.var(axis=0, dtype=np.float64).mean()
    expected += FLOOR * np.square(rows[:, None] - rows).sum(axis=-1)
    found = np.square((rows[:, None] - rows) @ metric).sum(axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


def test_the_columns_of_the_greatest_variance_are_chosen():
    states = np.random.default_rng(0).standard_normal((2000, 480)).astype(np.float32)
    states[:, :5] *= 10
    metric = logit_metric(states)
    assert metric.shape == (480, 80)
    kept = np.square(metric).sum(axis=1)
    np.testing.assert_allclose(kept[:5], 100 * 480 / 975, rtol=0.1)


def test_states_that_are_all_alike_leave_the_distances_as_they_are():
    metric = logit_metric(np.full((50, 8), 2, np.float32))
    np.testing.assert_allclose(metric @ metric.T, FLOOR * np.eye(8), atol=1e-6)
