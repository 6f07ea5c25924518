"""The kernels on values of any size, from 1 cluster to 262,144: ties, NaN, infinities, caps."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import kernel_checks as checks
from kernel_cases import kernels, plain_clusters, to_numpy
from mlx_flashhead.head.clustered import ALWAYS_PROBED, ClusteredRows
from mlx_flashhead.head.draws.greedy import best_draws
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import Candidates, PortableOperations, Selection

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_scale", [1e-20, 6e4, 1e30])
def test_no_magnitude_gives_an_infinity(dtype, hidden_scale):
    rng = np.random.default_rng(3)
    clustered, hidden = checks.small_head(rng, dtype=dtype, scale=2.0, n_tokens=299)
    if dtype == mx.float16 and hidden_scale == 1e30:
        hidden_scale = 2e4
    hidden = (hidden.astype(mx.float32) * hidden_scale).astype(dtype)
    hidden = mx.clip(hidden, mx.finfo(dtype).min, mx.finfo(dtype).max)
    outputs = checks.run(clustered, hidden, 9)
    checks.check_all(clustered, hidden, 9, outputs)
    for array in (outputs[0], outputs[2].logits, outputs[2].best, outputs[3]):
        assert np.isfinite(to_numpy(array)).all()


def test_a_sum_beyond_float32_saturates():
    clustered, _ = checks.small_head(np.random.default_rng(4), n_tokens=64)
    rows = Matrix(mx.ones((64, 128)))
    clustered = ClusteredRows.build(rows, to_numpy(clustered.token_ids), clustered.centroids)
    hidden = mx.stack([mx.full((128,), 3e36), mx.full((128,), -3e36)])
    _, _, candidates, full, _ = checks.run(clustered, hidden, 3)
    highest = mx.finfo(mx.float32).max
    assert (to_numpy(candidates.logits)[:, :3] == [[[highest]], [[-highest]]]).all()
    assert np.isfinite(to_numpy(full)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype):
    """On both paths, and at no other position; the greedy token is one of the vocabulary."""
    rng = np.random.default_rng(14)
    clustered, hidden = checks.small_head(rng, dtype=dtype, n_tokens=299)
    hidden[1, 7] = float("nan")
    outputs = checks.run(clustered, hidden, 9)
    for results in (outputs, checks.all_operations(PortableOperations(clustered), hidden, 9)):
        scores, _, candidates, full, token = results
        for array in map(to_numpy, (scores, full)):
            assert np.isnan(array[1]).all()
            assert np.isfinite(np.delete(array, 1, axis=0)).all()
        logits = to_numpy(candidates.logits)[1]
        assert np.isnan(logits[logits != mx.finfo(dtype).min]).all()
        assert (to_numpy(token) < 299).all()


def test_nan_of_one_token():
    """A row that holds NaN: its token is NaN, and so is what follows from the best candidate."""
    rng = np.random.default_rng(15)
    clustered, hidden = checks.small_head(rng)
    rows = Matrix(mx.random.normal((300, 128), key=mx.random.key(0)))
    rows.weight[123, 5] = float("nan")
    token_ids = to_numpy(clustered.token_ids)
    clustered = ClusteredRows.build(rows, token_ids, clustered.centroids, (123,))
    for _, selection, candidates, full, token in (
        checks.run(clustered, hidden, 9),
        checks.all_operations(PortableOperations(clustered), hidden, 9),
    ):
        values = to_numpy(full)
        logits = to_numpy(candidates.logits)
        assert np.isnan(values[:, 123]).all()
        assert (to_numpy(token) == 123).all()
        ids = token_ids[to_numpy(selection.probes)]
        assert np.isnan(values[0, ~np.isin(np.arange(300), ids[0])]).all()
        assert np.isnan(logits).sum() == len(hidden)
        assert np.isnan(logits[ids == 123]).all()


@pytest.mark.parametrize("n_probes", [1, 4, 38])
def test_the_lowest_of_equal_tokens_wins(n_probes):
    rng = np.random.default_rng(5)
    clustered, hidden = checks.small_head(rng)
    clustered = replace(clustered, rows=clustered.flat_rows().take(clustered.token_ids % 3))
    checks.check_all(clustered, hidden, n_probes, checks.run(clustered, hidden, n_probes))
    _, _, _, full, token = checks.all_operations(PortableOperations(clustered), hidden, n_probes)
    checks.check_token(full, token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tail_is_capped_below_the_best_candidate(dtype):
    """By 1, or a 64th of it where that is more; for bests of either sign, and forced clusters."""
    rng = np.random.default_rng(11)
    clustered, _ = checks.small_head(rng, dtype=dtype, n_tokens=299)
    bests = mx.array([-3e4, -300.0, -5.0, 0.0, 0.5, 40.0, 700.0, 6e4])
    logits = (bests[:, None, None] - mx.arange(3 * 8).reshape(1, 3, 8)).astype(dtype)
    scores = bests[:, None] + mx.array(rng.normal(scale=500, size=(8, 38)), mx.float32)
    scores[:, -1] = ALWAYS_PROBED
    probes = mx.broadcast_to(mx.array([4, 9, 11], dtype=mx.uint32), (8, 3))
    words = (scores + clustered.centroids.tail_offset).view(mx.uint32)
    words[:, probes[0]] = checks.PROBED + mx.arange(3, dtype=mx.uint32)
    selection = Selection(probes, words)
    candidates = Candidates(logits, logits.max(axis=-1).astype(mx.float32))
    scored = np.isin(to_numpy(clustered.slot_of) // 8, [4, 9, 11])
    with kernels():
        for operations in (MetalOperations(clustered), PortableOperations(clustered)):
            full = operations.expand(scores, selection, candidates)
            checks.check_full(clustered, scores, selection, candidates, full)
            others = to_numpy(full)[:, ~scored]
            best = to_numpy(logits).max(axis=(1, 2))
            assert (others.max(axis=-1) < best).all()


# 18,432 are the most that stay in registers, and 262,144 a Gemma head in clusters of 1
@pytest.mark.parametrize("n_clusters", [1, 5, 31, 32, 513, 9496, 18433, 262144])
def test_select_is_a_stable_sort_whatever_the_scores(n_clusters):
    """By bins of 1/64 nat: ties, forced, huge and tiny scores, both zeros; p from 1 to C."""
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(8, n_clusters)).astype(np.float32)
    scores[1] = 3.25
    scores[2] = rng.integers(-2, 3, size=n_clusters)
    # These are normal: a GPU may flush smaller ones.
    tiniest = 2.0**-126 * rng.uniform(1, 2, size=n_clusters)
    scores[3] = np.copysign(tiniest, scores[3])
    scores[4] *= np.float32(1e37)
    scores[5, rng.integers(n_clusters, size=3)] = ALWAYS_PROBED
    scores[6] = rng.choice([0.0, -0.0], size=n_clusters)
    scores[7] = rng.choice(np.float32([3.4028235e38, -3.4028235e38]), size=n_clusters)
    clustered = plain_clusters(rng, n_clusters)
    counts = {1, min(8, n_clusters), -(-n_clusters // 3), n_clusters}
    # The emulator takes its time.
    if n_clusters > 10_000:
        scores = scores[[2, 5]]
        counts = {200}
    for n_probes in sorted(counts):
        with kernels():
            selection = MetalOperations(clustered).select(mx.array(scores), n_probes)
            mx.eval(selection)
        checks.check_selection(clustered, mx.array(scores), n_probes, selection)


@pytest.mark.parametrize("n_clusters", [40, 9000])
def test_select_takes_nan_first(n_clusters):
    """Of either sign, as MLX's sort has them; -inf, which samplers give, is the last."""
    rng = np.random.default_rng(12)
    scores = rng.normal(size=(2, n_clusters)).astype(np.float32)
    scores[0, 5:] = -np.inf
    scores[:, [3, 17, 30]] = np.array([np.nan, -np.nan, np.nan], dtype=np.float32)
    with kernels():
        operations = MetalOperations(plain_clusters(rng, n_clusters))
        found = operations.select(mx.array(scores), 9)
        few = to_numpy(operations.select(mx.array(scores[1:]), 2).words)
    for probes, words, row in zip(*map(to_numpy, found[:2]), scores, strict=True):
        expected = np.argsort(np.where(np.isnan(row), -np.inf, -row), kind="stable")[:9]
        np.testing.assert_array_equal(probes, np.sort(expected))
        assert (words[probes] == checks.PROBED + np.arange(9)).all()
    # Three are NaN, of which two are probed.
    assert few[0, 30] == checks.NOT_A_NUMBER


@pytest.mark.parametrize("depth", [0.0, 2.5, 3.5, 40.0])
def test_clusters_far_below_the_best_are_not_read(depth):
    rng = np.random.default_rng(8)
    clustered, hidden = checks.small_head(rng, dtype=mx.bfloat16)
    with kernels() as emulator:
        operations = MetalOperations(clustered)
        scores = operations.route(hidden)
        selection = operations.select(scores, 30, depth=depth)
        candidates = operations.score(hidden, selection)
        tokens = operations.choose(selection, candidates, best_draws(len(scores)))[0]
        drawn = operations.select(scores, 30, words=False, depth=depth)
        mx.eval(tokens, drawn)
    checks.check_selection(clustered, scores, 30, selection, depth)
    checks.check_candidates(clustered, hidden, selection, candidates)
    for one, other in zip(drawn[::2], selection[::2], strict=True):
        np.testing.assert_array_equal(one, other)
    held = to_numpy(selection.probes)
    best = to_numpy(candidates.logits).reshape(5, -1)
    ids = to_numpy(clustered.token_ids)[held].reshape(5, -1)
    np.testing.assert_array_equal(tokens, ids[np.arange(5), best.argmax(axis=-1)])
    if emulator is not None:
        weight = emulator.dispatches[2].buffers["weight"]
        # Probes that are repeated are read once.
        n_read = held.size - (held[:, 1:] == held[:, :-1]).sum()
        assert weight.reads == weight.bytes // clustered.n_clusters * n_read
