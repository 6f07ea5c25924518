"""Runs all steps of a head on the kernels, and checks each one's results against float64."""

import mlx.core as mx
import numpy as np

from kernel_cases import ROUNDING, cluster, kernels, make_centroids, make_rows, products, to_numpy
from mlx_flashhead.head.kernels import MIN_PROBES, MetalSteps

PROBED, NOT_A_NUMBER = 0xFFC00000, 0x7FC00000  # words at or above the first are places


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


def portable_steps(steps, hidden, n_probes):
    """As `run`, on the portable path."""
    scores = steps.route(hidden)
    selection = steps.select(scores, n_probes)
    candidates = steps.score(hidden, selection)
    full = steps.expand(scores, selection, candidates)
    return scores, selection, candidates, full, steps.token(selection, candidates)


def small_head(rng, *, dtype=mx.float32, scale=0.05, forced=(), n_tokens=300, hidden_size=128):
    rows = make_rows(rng, n_tokens, hidden_size, bits=8, group_size=64, dtype=dtype, scale=scale)
    centroids = make_centroids(rng, -(-n_tokens // 8), hidden_size, group_size=64)
    hidden = mx.array(rng.normal(size=(5, hidden_size))).astype(dtype)
    return cluster(rng, rows, centroids, 8, forced), hidden


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
