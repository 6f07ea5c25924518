"""The Metal kernels against numpy in float64, and against the portable path.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

from dataclasses import replace
from itertools import combinations, product

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import (
    ROUNDING,
    cluster,
    covering_cases,
    kernels,
    make_centroids,
    make_rows,
    on_gpu,
    pairs_of,
    products,
    to_numpy,
)
from mlx_flashhead.head.clustered import ALWAYS_PROBED, ClusteredRows
from mlx_flashhead.head.formats import FORMATS
from mlx_flashhead.head.kernels import MIN_PROBES, MetalSteps, matrix_from, unread
from mlx_flashhead.head.portable import PortableSteps
from mlx_flashhead.head.steps import Candidates, Selection

PROBED, NOT_A_NUMBER = 0xFFC00000, 0x7FC00000  # words at or above the first are places
FACTORS = {
    "batch": (1, 2, 5, 32),
    "n_probes": (1, 7, 8, 64, 512, "C"),
    "cluster_size": (8, 16, 32),
    "hidden_size": (64, 576, 640, 1024, 1152, 2048, 2560),
    "divisible": (True, False),
    "dtype": ("float32", "float16", "bfloat16"),
    "bits": (4, 8, 16),
    "group_size": (32, 64, 128),
    "centroid_group": (0, 32, 64),
}
# Few clusters, so that the cases are quick; fewer than 8 where MLX passes arrays as `constant`.
N_CLUSTERS = {1: 6, 7: 19, 8: 21, 64: 70, 512: 530, "C": 5}


def n_weights(case) -> int:
    """Weights that score reads."""
    n_probes = N_CLUSTERS["C"] if case["n_probes"] == "C" else case["n_probes"]
    return case["batch"] * n_probes * case["cluster_size"] * case["hidden_size"]


def is_valid(case) -> bool:
    """Whether such rows exist, and the emulator is through with them in a second or two."""
    return case["hidden_size"] % case["group_size"] == 0 and n_weights(case) <= 2**24


CASES = covering_cases(FACTORS, is_valid, n_weights)


def test_cases_cover_every_pair_of_values():
    """All pairs of values but those of a group size that does not divide the hidden size."""
    covered = set().union(*map(pairs_of, CASES))
    for one, other in combinations(FACTORS, 2):
        for values in product(FACTORS[one], FACTORS[other]):
            pair = ((one, values[0]), (other, values[1]))
            impossible = (one, other) == ("hidden_size", "group_size") and values[0] % values[1]
            assert (pair in covered) != bool(impossible), pair


def head_of(rng, case, dtype):
    n_clusters = N_CLUSTERS[case["n_probes"]]
    n_tokens = n_clusters * case["cluster_size"] - (0 if case["divisible"] else 3)
    rows_dtype = mx.bfloat16 if dtype == mx.float32 and case["bits"] == 16 else dtype
    rows = make_rows(
        rng,
        n_tokens,
        case["hidden_size"],
        bits=case["bits"],
        group_size=case["group_size"],
        dtype=rows_dtype,
    )
    centroids = make_centroids(
        rng, n_clusters, case["hidden_size"], group_size=case["centroid_group"]
    )
    return cluster(rng, rows, centroids, case["cluster_size"])


def run(clustered, hidden, n_probes, **options):
    """All five steps."""
    with kernels(**options):
        steps = MetalSteps(clustered)
        scores = steps.route(hidden)
        selection = steps.select(scores, n_probes)
        candidates = steps.score(hidden, selection)
        full = steps.expand(scores, selection, candidates)
        token = steps.token(selection, candidates)
        mx.eval(scores, selection, candidates, full, token)
    return scores, selection, candidates, full, token


def check_scores(clustered, hidden, scores):
    expected, error = products(clustered.centroids.matrix, hidden)
    expected = expected + to_numpy(clustered.route_bias).astype(np.float64)
    # the bias is added in float32, and forced ones are 1e30
    error = error + ROUNDING[mx.float32] * np.abs(expected) + 1e-30
    assert scores.dtype == mx.float32
    assert (np.abs(to_numpy(scores) - expected) <= error).all()


def check_selection(clustered, scores, n_probes, selection):
    """Exactly the first p of a stable sort, ascending, and each cluster's place or estimate."""
    scores = to_numpy(scores)
    held, words = to_numpy(selection.probes), to_numpy(selection.words)
    probes = held[:, :n_probes]
    assert held.dtype == words.dtype == np.uint32
    assert held.shape[1] == max(n_probes, MIN_PROBES)
    assert (held[:, n_probes:] == held[:, n_probes - 1 : n_probes]).all()
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :n_probes]
    np.testing.assert_array_equal(probes, np.sort(best, axis=-1))
    highest = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        estimates = scores + to_numpy(clustered.centroids.tail_offset)
    expected = np.clip(estimates, -highest, highest).view(np.uint32)
    expected[np.isnan(estimates)] = NOT_A_NUMBER
    places = np.broadcast_to(PROBED + np.arange(n_probes, dtype=np.uint32), probes.shape)
    np.put_along_axis(expected, probes.astype(np.int64), places, axis=-1)
    is_zero = (words << 1 == 0) & (expected << 1 == 0)  # of either sign
    np.testing.assert_array_equal(words[~is_zero], expected[~is_zero])


def check_candidates(clustered, hidden, selection, candidates):
    """Logits within the error of a float32 sum and one rounding; bests are their exact maxima.

    With a bias the product is rounded before it is added, as the layers of MLX do.
    """
    dtype = clustered.rows.logits_dtype(hidden.dtype)
    assert candidates.logits.dtype == dtype
    probes = to_numpy(selection.probes)
    every, errors = products(clustered.rows, hidden)  # (R, C, n)
    if clustered.rows.bias is not None:
        errors = errors + ROUNDING[clustered.rows.product_dtype(hidden.dtype)] * np.abs(every)
        every = every + to_numpy(clustered.rows.bias)
    of_probes = (np.arange(len(probes))[:, None], probes)
    highest = mx.finfo(dtype).max
    expected = np.clip(every[of_probes], -highest, highest)
    error = errors[of_probes] + ROUNDING[dtype] * np.abs(expected) + 1e-7
    logits = to_numpy(candidates.logits).astype(np.float64)
    padded = to_numpy(clustered.token_ids)[probes] == clustered.vocab_size
    assert (logits[padded] == mx.finfo(dtype).min).all()
    assert (np.abs(logits - expected) <= error)[~padded].all()
    np.testing.assert_array_equal(to_numpy(candidates.best), logits.max(axis=-1))


def check_full(clustered, scores, selection, candidates, full):
    """Exact, given the other steps' outputs: all of it is one sum, one minimum, one rounding."""
    dtype, logits = candidates.logits.dtype, to_numpy(candidates.logits)
    n_rows, _, cluster_size = logits.shape
    probes, slot_of = to_numpy(selection.probes), to_numpy(clustered.slot_of)
    best = logits.reshape(n_rows, -1).max(axis=-1, keepdims=True).astype(np.float32)
    cap = best - np.maximum(np.float32(1), np.abs(best) / np.float32(64))
    tail = np.minimum(to_numpy(scores) + to_numpy(clustered.centroids.tail_offset), cap)
    lowest = mx.finfo(dtype).min
    tail = to_numpy(mx.array(np.maximum(tail, np.float32(lowest))).astype(dtype))
    slots = np.repeat(tail[:, :, None], cluster_size, axis=-1)
    slots[np.arange(n_rows)[:, None], probes] = logits
    assert full.dtype == dtype
    np.testing.assert_array_equal(to_numpy(full), slots.reshape(n_rows, -1)[:, slot_of])
    assert np.isfinite(to_numpy(full)).all()


def check_token(full, token):
    """The argmax over the vocabulary: the first of equal logits, and a scored one."""
    assert token.dtype == mx.uint32
    np.testing.assert_array_equal(to_numpy(token), to_numpy(full).argmax(axis=-1))


def check_all(clustered, hidden, n_probes, outputs):
    scores, selection, candidates, full, token = outputs
    check_scores(clustered, hidden, scores)
    check_selection(clustered, scores, n_probes, selection)
    check_candidates(clustered, hidden, selection, candidates)
    check_full(clustered, scores, selection, candidates, full)
    check_token(full, token)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_steps_match_float64(case):
    rng = np.random.default_rng(0)
    dtype = getattr(mx, case["dtype"])
    clustered = head_of(rng, case, dtype)
    hidden = mx.array(rng.normal(size=(case["batch"], case["hidden_size"]))).astype(dtype)
    n_probes = clustered.n_clusters if case["n_probes"] == "C" else case["n_probes"]
    check_all(clustered, hidden, n_probes, run(clustered, hidden, n_probes))


@pytest.mark.parametrize(
    ("form", "rows_dtype", "hidden_dtype", "cluster_size", "bias_dtype"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, mx.bfloat16, mx.bfloat16, 16, None),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, mx.float32, mx.float32, 5, mx.float32),
        ({"bits": 32, "group_size": 0}, mx.float32, mx.float32, 16, mx.float32),
        ({"bits": 32, "group_size": 0}, mx.float32, mx.bfloat16, 4, None),
        ({"bits": 16, "group_size": 0}, mx.float16, mx.bfloat16, 3, mx.float16),
        ({"bits": 16, "group_size": 0}, mx.bfloat16, mx.bfloat16, 128, mx.bfloat16),
        ({"bits": 4, "group_size": 64}, mx.bfloat16, mx.bfloat16, 203, None),
        ({"bits": 4, "group_size": 64}, mx.float16, mx.bfloat16, 1, mx.bfloat16),
        ({"bits": 8, "group_size": 128}, mx.bfloat16, mx.float16, 18, mx.float16),
    ],
)
def test_other_rows_dtypes_biases_and_cluster_sizes(
    form, rows_dtype, hidden_dtype, cluster_size, bias_dtype
):
    rng = np.random.default_rng(1)
    n_clusters, hidden_size = 7, 384
    n_tokens = n_clusters * cluster_size - (2 if cluster_size > 2 else 0)
    rows = make_rows(rng, n_tokens, hidden_size, dtype=rows_dtype, **form)
    if bias_dtype is not None:
        bias = mx.array(rng.normal(size=n_tokens)).astype(bias_dtype)
        rows = type(rows)(**{**rows.__dict__, "bias": bias})
    clustered = cluster(
        rng, rows, make_centroids(rng, n_clusters, hidden_size, group_size=64), cluster_size
    )
    hidden = mx.array(rng.normal(size=(3, hidden_size))).astype(hidden_dtype)
    for n_probes in (1, 5, n_clusters):
        check_all(clustered, hidden, n_probes, run(clustered, hidden, n_probes))


def bare_clusters(rng, n_clusters):
    """Clusters of one token each, with nothing in their rows: for select alone."""
    rows = make_rows(rng, n_clusters, 4, bits=16, group_size=0, dtype=mx.float16)
    centroids = make_centroids(rng, n_clusters, 4, group_size=0, dtype=mx.float16)
    return cluster(rng, rows, centroids, 1)


# 8,192 are the most that stay in registers, and 262,144 a Gemma head in clusters of 1
@pytest.mark.parametrize("n_clusters", [1, 5, 31, 32, 513, 8016, 8193, 16384, 262144])
def test_select_is_a_stable_sort_whatever_the_scores(n_clusters):
    """Ties, all equal, forced, huge and tiny scores, both zeros; p from 1 to C."""
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
    for probes, words, row in zip(*map(to_numpy, found), scores, strict=True):
        assert {3, 17, 30} <= set(probes.tolist()) if row is scores[1] else {17, 30} <= set(probes)
        expected = np.argsort(np.where(np.isnan(row), -np.inf, -row), kind="stable")[:9]
        np.testing.assert_array_equal(probes, np.sort(expected))
        assert (words[probes] == PROBED + np.arange(9)).all()
    few = mx.array(scores[1:])
    with kernels():
        words = to_numpy(MetalSteps(clustered).select(few, 2).words)
    assert words[0, 30] == NOT_A_NUMBER  # three are NaN, of which two are probed


def small_head(rng, *, dtype=mx.float32, scale=0.05, forced=(), n_tokens=300, hidden_size=128):
    rows = make_rows(rng, n_tokens, hidden_size, bits=8, group_size=64, dtype=dtype, scale=scale)
    centroids = make_centroids(rng, -(-n_tokens // 8), hidden_size, group_size=64)
    hidden = mx.array(rng.normal(size=(5, hidden_size))).astype(dtype)
    return cluster(rng, rows, centroids, 8, forced), hidden


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("hidden_scale", [1e-20, 1e-4, 6e4, 1e30])
def test_no_magnitude_gives_an_infinity(dtype, hidden_scale):
    rng = np.random.default_rng(3)
    clustered, hidden = small_head(rng, dtype=dtype, scale=2.0, n_tokens=299)
    if dtype == mx.float16 and hidden_scale == 1e30:
        hidden_scale = 2e4
    hidden = (hidden.astype(mx.float32) * hidden_scale).astype(dtype)
    hidden = mx.clip(hidden, mx.finfo(dtype).min, mx.finfo(dtype).max)
    outputs = run(clustered, hidden, 9)
    check_all(clustered, hidden, 9, outputs)
    for array in (outputs[0], outputs[2].logits, outputs[2].best, outputs[3]):
        assert np.isfinite(to_numpy(array)).all()


def test_a_sum_beyond_float32_saturates():
    rng = np.random.default_rng(4)
    rows = make_rows(rng, 64, 64, bits=32, group_size=0, dtype=mx.float32)
    rows = rows.map(lambda weight: mx.abs(weight) + 1.0)
    clustered = cluster(rng, rows, make_centroids(rng, 8, 64, group_size=64), 8)
    hidden = mx.stack([mx.full((64,), 3e37), mx.full((64,), -3e37)])
    _, _, candidates, full, _ = run(clustered, hidden, 3)
    highest = mx.finfo(mx.float32).max
    assert (to_numpy(candidates.logits)[0] == highest).all()
    assert (to_numpy(candidates.logits)[1] == -highest).all()
    assert np.isfinite(to_numpy(full)).all()


@pytest.mark.parametrize("hidden_size", [5, 66, 1023])
def test_floats_of_any_width(hidden_size):
    """A row may end within a chunk, and begin anywhere."""
    rng = np.random.default_rng(13)
    rows = make_rows(rng, 157, hidden_size, bits=16, group_size=0, dtype=mx.bfloat16)
    centroids = make_centroids(rng, 20, hidden_size, group_size=0)
    clustered = cluster(rng, rows, centroids, 8)
    hidden = mx.array(rng.normal(size=(3, hidden_size))).astype(mx.bfloat16)
    check_all(clustered, hidden, 9, run(clustered, hidden, 9))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_nan_stays_nan(dtype):
    """On both paths, and at no other position; the greedy token is one of the vocabulary."""
    rng = np.random.default_rng(14)
    clustered, hidden = small_head(rng, dtype=dtype, n_tokens=299)
    hidden[1, 7] = float("nan")
    outputs = run(clustered, hidden, 9)
    plain = PortableSteps(clustered)
    for steps_of in (outputs, portable_steps(plain, hidden, 9)):
        scores, _, candidates, full, token = steps_of
        for array in (scores, full):
            assert np.isnan(to_numpy(array)[1]).all()
            assert np.isfinite(np.delete(to_numpy(array), 1, axis=0)).all()
        real = to_numpy(candidates.logits)[1] != mx.finfo(dtype).min
        assert np.isnan(to_numpy(candidates.logits)[1][real]).all()
        assert (to_numpy(token) < 299).all()
    others = [0, 2, 3, 4]
    sound = run(clustered, hidden[mx.array(others)], 9)
    np.testing.assert_array_equal(to_numpy(outputs[3])[others], to_numpy(sound[3]))


def test_nan_of_one_token():
    """A row that holds NaN: its token is NaN, and so is what follows from the best candidate."""
    rng = np.random.default_rng(15)
    clustered, hidden = small_head(rng, dtype=mx.float32)
    rows = make_rows(rng, 300, 128, bits=32, group_size=0, dtype=mx.float32)
    rows.weight[123, 5] = float("nan")
    token_ids = to_numpy(clustered.token_ids)
    clustered = ClusteredRows.build(rows, token_ids, clustered.centroids, (123,))
    outputs = run(clustered, hidden, 9)
    for _, selection, candidates, full, token in (
        outputs, portable_steps(PortableSteps(clustered), hidden, 9)
    ):  # fmt: skip
        values, logits = to_numpy(full), to_numpy(candidates.logits)
        assert np.isnan(values[:, 123]).all() and (to_numpy(token) == 123).all()
        ids = token_ids[to_numpy(selection.probes)]
        scored = np.isin(np.arange(300), ids[0])
        assert np.isnan(values[0, ~scored]).all()
        assert np.isnan(logits).sum() == len(hidden) and np.isnan(logits[ids == 123]).all()


def portable_steps(steps, hidden, n_probes):
    """As `run`, on the portable path."""
    scores = steps.route(hidden)
    selection = steps.select(scores, n_probes)
    candidates = steps.score(hidden, selection)
    full = steps.expand(scores, selection, candidates)
    return scores, selection, candidates, full, steps.token(selection, candidates)


@pytest.mark.parametrize("n_probes", [1, 4, 40])
def test_the_lowest_of_equal_tokens_wins(n_probes):
    """Three distinct rows for 300 tokens: the winner is there a hundred times."""
    rng = np.random.default_rng(5)
    clustered, hidden = small_head(rng)
    three = mx.array(rng.integers(3, size=(clustered.n_clusters, clustered.cluster_size)))
    rows = make_rows(rng, 3, 128, bits=8, group_size=64, dtype=mx.float32).take(three)
    clustered = type(clustered)(**{**clustered.__dict__, "rows": rows})
    n_probes = min(n_probes, clustered.n_clusters)
    check_all(clustered, hidden, n_probes, run(clustered, hidden, n_probes))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_tail_is_capped_below_the_best_candidate(dtype):
    """By 1, or a 64th of it where that is more; for bests of either sign, and forced clusters."""
    rng = np.random.default_rng(11)
    clustered, _ = small_head(rng, dtype=dtype, n_tokens=299)
    bests = mx.array([-3e4, -300.0, -5.0, 0.0, 0.5, 40.0, 700.0, 6e4])
    n_rows, n_clusters = bests.size, clustered.n_clusters
    logits = (bests[:, None, None] - mx.arange(3 * 8).reshape(1, 3, 8)).astype(dtype)
    scores = bests[:, None] + mx.array(rng.normal(scale=500, size=(n_rows, n_clusters)))
    scores[:, -1] = ALWAYS_PROBED
    probes = mx.broadcast_to(mx.array([4, 9, 11], dtype=mx.uint32), (n_rows, 3))
    scores = scores.astype(mx.float32)
    words = (scores + clustered.centroids.tail_offset).view(mx.uint32)
    words[:, mx.array([4, 9, 11])] = PROBED + mx.arange(3, dtype=mx.uint32)
    candidates = Candidates(logits, logits.max(axis=-1).astype(mx.float32))
    with kernels():
        steps = MetalSteps(clustered)
        full = steps.expand(scores, Selection(probes, words), candidates)
        mx.eval(full)
    check_full(clustered, scores, Selection(probes), candidates, full)
    scored = np.isin(to_numpy(clustered.slot_of) // 8, [4, 9, 11])
    found, best = to_numpy(full), to_numpy(logits).max(axis=(1, 2))
    assert (found[:, ~scored].max(axis=-1) < best).all()


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


@pytest.mark.skipif(on_gpu(), reason="a GPU's order of threads cannot be chosen")
def test_outputs_do_not_depend_on_the_order_of_threads():
    rng = np.random.default_rng(7)
    clustered, hidden = small_head(rng, dtype=mx.bfloat16, n_tokens=8 * 700 - 1)
    hidden = mx.round(hidden * 2)  # ties
    outputs = [
        run(clustered, hidden, 45, order=order, seed=seed)
        for order, seed in (("forward", 0), ("reverse", 0), ("shuffle", 1), ("shuffle", 2))
    ]
    flat = [[s, *e, *c, f, t] for s, e, c, f, t in outputs]
    for others in flat[1:]:
        for first, other in zip(flat[0], others, strict=True):
            np.testing.assert_array_equal(to_numpy(first), to_numpy(other))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_step_agrees_with_the_portable_path(bits):
    """In float32, where the CPU build is exact; each step is given the kernels' inputs."""
    rng = np.random.default_rng(8)
    rows = make_rows(rng, 797, 320, bits=bits, group_size=64, dtype=mx.float32)
    clustered = cluster(rng, rows, make_centroids(rng, 50, 320, group_size=64), 16, (5,))
    hidden = mx.array(rng.normal(size=(3, 320)).astype(np.float32))
    scores, selection, candidates, full, token = run(clustered, hidden, 11)
    close = {"rtol": 1e-5, "atol": 1e-5}
    with mx.stream(mx.cpu):  # on a Mac, too
        steps = PortableSteps(clustered)
        np.testing.assert_allclose(to_numpy(scores), to_numpy(steps.route(hidden)), **close)
        probes = to_numpy(steps.select(scores, 11).probes)
        assert selection.probes.shape == (3, 11)
        np.testing.assert_array_equal(to_numpy(selection.probes), np.sort(probes, axis=-1))
        only_probes = Selection(selection.probes)
        logits = steps.score(hidden, only_probes).logits
        np.testing.assert_allclose(to_numpy(candidates.logits), to_numpy(logits), **close)
        only_logits = Candidates(candidates.logits)
        expanded = steps.expand(scores, only_probes, only_logits)
        np.testing.assert_array_equal(to_numpy(full), to_numpy(expanded))
        tokens = steps.token(only_probes, only_logits)
        np.testing.assert_array_equal(to_numpy(token), to_numpy(tokens))


UNREAD = [one for one in FORMATS if one.metal is None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", UNREAD, ids=str)
def test_rows_that_no_kernel_reads_are_scored_by_mlx(form, bias):
    """All other steps are kernels, and their results are the portable path's."""
    rng = np.random.default_rng(9)
    group_size = form.group_sizes[-1]
    shape = {"bits": form.bits, "group_size": group_size, "mode": form.mode}
    rows = make_rows(rng, 157, 128, dtype=mx.float32, **shape)
    if bias:
        rows = replace(rows, bias=mx.array(rng.normal(size=157).astype(np.float32)))
    clustered = cluster(rng, rows, make_centroids(rng, 20, 128, group_size=64), 8, (5,))
    hidden = mx.array(rng.normal(size=(3, 128)).astype(np.float32))
    assert unread(clustered) == {"score": str(form)}
    plain = PortableSteps(clustered)
    for n_probes in (2, 11):
        scores, selection, _, full, token = run(clustered, hidden, n_probes)
        check_selection(clustered, scores, n_probes, selection)
        only = Selection(selection.probes), Candidates(plain.score(hidden, selection).logits)
        np.testing.assert_allclose(
            to_numpy(full), to_numpy(plain.expand(scores, *only)), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(to_numpy(token), to_numpy(full).argmax(axis=-1))


@pytest.mark.parametrize("architecture, limits", [
    ("applegpu_g13g", (14, 10, 6)), ("applegpu_g14s", (14, 10, 6)), ("applegpu_g13d", (32, 18, 12)),
    ("applegpu_g15s", (13, 15, 13)), ("applegpu_g16p", (13, 15, 13)),
    ("applegpu_g15d", (32, 18, 12)), ("applegpu_g17s", (33, 25, 13)),
    ("applegpu_g12p", (18, 12, 10)), ("x86_64", (33, 25, 13)),
])  # fmt: skip
def test_where_mlx_takes_its_matrix_kernels(architecture, limits):
    """As get_qmv_batch_limit of MLX 0.32 has it."""
    sizes = ((2048, 2048), (2048, 4096), (2048, 8016))
    assert tuple(matrix_from(*size, architecture) for size in sizes) == limits
