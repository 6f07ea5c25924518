"""Balanced clusters of a head's rows, and the distance of two tokens."""

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.conversion import clusters, run_task
from mlx_flashhead.conversion.clusters import cluster_rows

METRICS = [None, np.eye(24, dtype=np.float32)]


def cluster(rows, cluster_size=16, **options):
    return run_task(cluster_rows(rows, cluster_size, **options))


def normal_rows(vocab_size, hidden_size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((vocab_size, hidden_size)).astype(np.float32)


def planted_rows(n_groups, group_size, hidden_size, *, noise=0.1, common=0.0, seed=0):
    """Rows in random order around group centres, and the group of each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_groups, hidden_size))
    group_of = rng.permutation(np.repeat(np.arange(n_groups), group_size))
    rows = centres[group_of] + noise * rng.standard_normal((len(group_of), hidden_size))
    rows += common * np.eye(hidden_size)[0]
    return rows.astype(np.float32), group_of


def check_balanced(token_ids, vocab_size, cluster_size, spread=1):
    """Each token once, clusters equally full up to ``spread``, the padding at their ends."""
    n_clusters = -(-vocab_size // cluster_size)
    assert token_ids.shape == (n_clusters, cluster_size)
    assert token_ids.dtype == np.uint32
    flat = token_ids.ravel()
    np.testing.assert_array_equal(np.sort(flat[flat < vocab_size]), np.arange(vocab_size))
    assert (flat <= vocab_size).all()
    # So V, the highest, is last.
    assert (np.diff(token_ids.astype(np.int64), axis=1) >= 0).all()
    sizes = (token_ids < vocab_size).sum(axis=1)
    assert sizes.min() >= max(1, sizes.max() - spread)


def scatter(rows, token_ids):
    """Mean squared distance between a row and its cluster's mean."""
    total = 0.0
    for ids in token_ids:
        members = rows[ids[ids < len(rows)]]
        total += np.square(members - members.mean(axis=0)).sum()
    return total / len(rows)


@pytest.mark.parametrize(
    ("vocab_size", "cluster_size"),
    [(1, 1), (7, 7), (7, 1), (17, 16), (100, 99), (257, 2), (4211, 16)],
)
def test_balanced_for_any_vocabulary(vocab_size, cluster_size):
    token_ids = cluster(normal_rows(vocab_size, 11), cluster_size)
    check_balanced(token_ids, vocab_size, cluster_size)


@pytest.mark.parametrize(("metric", "common"), [(METRICS[0], 30), (METRICS[1], 0)])
def test_recovers_planted_clusters(metric, common):
    """Also where all rows have much in common, which says nothing about their differences."""
    rows, group_of = planted_rows(120, 16, 24, common=common)
    token_ids = cluster(rows, metric=metric)
    check_balanced(token_ids, len(rows), 16)
    pure = (group_of[token_ids] == group_of[token_ids[:, :1]]).all(axis=1)
    assert pure.mean() > 0.8
    planted = np.argsort(group_of, kind="stable").reshape(-1, 16)
    assert scatter(rows, planted) < 0.3
    in_order = scatter(rows, np.arange(len(rows)).reshape(-1, 16))
    assert scatter(rows, token_ids) < 0.2 * in_order


def test_without_a_metric_only_directions_count():
    rows = normal_rows(480, 2)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    stretched = rows * np.random.default_rng(1).choice([1, 20], size=(480, 1)).astype(np.float32)
    by_direction = cluster(stretched, 8)
    by_distance = cluster(stretched, 8, metric=np.eye(2, dtype=np.float32))
    assert scatter(stretched, by_distance) < 0.5 * scatter(stretched, by_direction)
    assert scatter(rows, by_direction) < 0.5 * scatter(rows, by_distance)
    np.testing.assert_array_equal(by_direction, cluster(4 * stretched, 8))


def test_clusters_by_mlx_are_as_good_and_without_prices_they_are_worse(monkeypatch):
    rows = normal_rows(1500, 16) @ np.diag(0.8 ** np.arange(16)).astype(np.float32)
    metric = np.eye(16, dtype=np.float32)
    expected = scatter(rows, cluster(rows, metric=metric))
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        token_ids = cluster(rows, metric=metric)
    check_balanced(token_ids, 1500, 16)
    assert scatter(rows, token_ids) == pytest.approx(expected, rel=0.01)
    monkeypatch.setattr(clusters, "FIRST_PRICE_UPDATES", 0)
    monkeypatch.setattr(clusters, "LATER_PRICE_UPDATES", 0)
    assert expected < 0.99 * scatter(rows, cluster(rows, metric=metric))


@pytest.mark.parametrize(
    ("kind", "metric"), [("equal", None), ("zero", METRICS[1]), ("nearly equal", METRICS[1])]
)
def test_thousands_of_unused_tokens_keep_to_themselves(kind, metric):
    rows, group_of = planted_rows(60, 16, 24)
    rng = np.random.default_rng(1)
    n_unused = 3001
    if kind == "zero":
        unused = np.zeros((n_unused, 24))
    else:
        unused = np.full((n_unused, 24), 0.5)
    if kind == "nearly equal":
        unused += 0.02 * rng.standard_normal(unused.shape)
    order = rng.permutation(len(rows) + n_unused)
    rows = np.concatenate([rows, unused])[order].astype(np.float32)
    group_of = np.concatenate([group_of, np.full(n_unused, -1)])[order]
    token_ids = cluster(rows, metric=metric)
    check_balanced(token_ids, len(rows), 16)
    groups = np.where(token_ids < len(rows), np.append(group_of, -2)[token_ids], -2)
    mixed = (groups == -1).any(axis=1) & (groups >= 0).any(axis=1)
    assert mixed.sum() <= 2
    used_groups = groups[(groups >= 0).all(axis=1)]
    assert (used_groups == used_groups[:, :1]).all(axis=1).mean() > 0.8


@pytest.mark.parametrize(("n_alike", "metric"), [(0, None), (1280, np.eye(640, dtype=np.float32))])
def test_memory_is_one_copy_of_the_rows(monkeypatch, n_alike, metric):
    """And half of another for all else, so that rows and all are 2.5 heads."""
    monkeypatch.setattr(clusters, "BLOCK_ROWS", 64)
    monkeypatch.setattr(clusters, "DUPLICATE_SAMPLE", 64)
    rows = normal_rows(2560, 640)
    rows[:n_alike] = rows[0]
    tracemalloc.start()
    token_ids = cluster(rows, metric=metric, passes=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    check_balanced(token_ids, len(rows), 16)
    assert peak < 1.5 * rows.nbytes


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_rows_that_are_not_finite(value):
    with pytest.raises(ValueError, match="NaN or infinity: check the model's output weights"):
        cluster(np.full((40, 4), value))
