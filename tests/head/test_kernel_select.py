"""The kernel that chooses clusters: ties, NaN, forced clusters, from 1 cluster to 262,144."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import cluster, kernels, make_centroids, make_rows, to_numpy
from kernel_checks import (
    NOT_A_NUMBER,
    PROBED,
    check_all,
    check_candidates,
    check_full,
    check_selection,
    check_token,
    run,
    small_head,
)
from mlx_flashhead.head.clustered import ALWAYS_PROBED
from mlx_flashhead.head.kernels import MetalSteps


def bare_clusters(rng, n_clusters):
    """Clusters of one token each, with nothing in their rows: for select alone."""
    rows = make_rows(rng, n_clusters, 4, bits=16, group_size=0, dtype=mx.float16)
    centroids = make_centroids(rng, n_clusters, 4, group_size=0, dtype=mx.float16)
    return cluster(rng, rows, centroids, 1)


# 16,384 are the most that stay in registers, and 262,144 a Gemma head in clusters of 1
@pytest.mark.parametrize("n_clusters", [1, 5, 31, 32, 513, 9496, 16384, 16385, 262144])
def test_select_is_a_stable_sort_whatever_the_scores(n_clusters):
    """By bins of 1/64 nat: ties, forced, huge and tiny scores, both zeros; p from 1 to C."""
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(8, n_clusters)).astype(np.float32)
    scores[1] = 3.25
    scores[2] = rng.integers(-2, 3, size=n_clusters)
    tiniest = 2.0**-126 * rng.uniform(1, 2, size=n_clusters)  # normal: a GPU may flush smaller ones
    scores[3] = np.copysign(tiniest, scores[3])
    scores[4] *= np.float32(1e37)
    scores[5, rng.integers(n_clusters, size=3)] = ALWAYS_PROBED
    scores[6] = rng.choice([0.0, -0.0], size=n_clusters)
    scores[7] = rng.choice(np.float32([3.4028235e38, -3.4028235e38]), size=n_clusters)
    clustered = bare_clusters(rng, n_clusters)
    counts = {1, min(8, n_clusters), -(-n_clusters // 3), n_clusters}
    if n_clusters > 10_000:  # the emulator takes its time
        scores, counts = scores[[2, 5]], {200}
    for n_probes in sorted(counts):
        with kernels():
            selection = MetalSteps(clustered).select(mx.array(scores), n_probes)
            mx.eval(selection)
        check_selection(clustered, mx.array(scores), n_probes, selection)


@pytest.mark.parametrize("n_clusters", [40, 9000])
def test_select_takes_nan_first(n_clusters):
    """Of either sign, as MLX's sort has them; -inf, which samplers give, is the last."""
    rng = np.random.default_rng(12)
    scores = rng.normal(size=(2, n_clusters)).astype(np.float32)
    scores[:, [3, 17, 30]] = np.array([np.nan, -np.nan, np.nan], dtype=np.float32)
    scores[0, 5:] = -np.inf
    scores[0, [17, 30]] = np.nan
    clustered = bare_clusters(rng, n_clusters)
    with kernels():
        found = MetalSteps(clustered).select(mx.array(scores), 9)
        mx.eval(found)
    for probes, words, row in zip(*map(to_numpy, found[:2]), scores, strict=True):
        assert {3, 17, 30} <= set(probes.tolist()) if row is scores[1] else {17, 30} <= set(probes)
        expected = np.argsort(np.where(np.isnan(row), -np.inf, -row), kind="stable")[:9]
        np.testing.assert_array_equal(probes, np.sort(expected))
        assert (words[probes] == PROBED + np.arange(9)).all()
    few = mx.array(scores[1:])
    with kernels():
        words = to_numpy(MetalSteps(clustered).select(few, 2).words)
    assert words[0, 30] == NOT_A_NUMBER  # three are NaN, of which two are probed


def test_forced_clusters_are_always_probed():
    rng = np.random.default_rng(6)
    forced = (7, 100, 299)
    clustered, hidden = small_head(rng, forced=forced)
    outputs = run(clustered, hidden, 4)
    check_all(clustered, hidden, 4, outputs)
    clusters = {int(clustered.slot_of[i]) // clustered.cluster_size for i in forced}
    for probes in outputs[1].probes.tolist():
        assert clusters <= set(probes)
    few = run(clustered, hidden, 2)  # more forced than probed: they still end below the cap
    check_full(clustered, few[0], *few[1:4])
    check_token(few[3], few[4])


@pytest.mark.parametrize("depth", [0.0, 2.5, 3.5, 40.0])
def test_clusters_far_below_the_best_are_not_read(depth):
    rng = np.random.default_rng(8)
    clustered, hidden = small_head(rng, dtype=mx.bfloat16)
    with kernels() as emulator:
        steps = MetalSteps(clustered)
        scores = steps.route(hidden)
        selection = steps.select(scores, 30, depth=depth)
        candidates = steps.score(hidden, selection)
        tokens = steps.token(selection, candidates)
        drawn = steps.select(scores, 30, words=False, depth=depth)
        mx.eval(tokens, drawn)
    check_selection(clustered, scores, 30, selection, depth)
    check_candidates(clustered, hidden, selection, candidates)
    for one, other in zip(drawn[::2], selection[::2], strict=True):
        np.testing.assert_array_equal(one, other)
    best = to_numpy(candidates.logits).reshape(5, -1).argmax(axis=-1)
    ids = to_numpy(clustered.token_ids)[to_numpy(selection.probes)].reshape(5, -1)
    np.testing.assert_array_equal(tokens, ids[np.arange(5), best])
    if emulator is not None:
        weight = emulator.dispatches[2].buffers["weight"]
        held = to_numpy(selection.probes)
        repeats = (held[:, 1:] == held[:, :-1]).sum()
        assert weight.reads == weight.bytes // clustered.n_clusters * (held.size - repeats)
