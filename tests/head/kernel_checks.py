"""Runs all operations of a head on the kernels, and checks each one's results against float64."""

import mlx.core as mx
import numpy as np

from kernel_cases import ROUNDING, kernels, make_clustered, products, to_numpy
from mlx_flashhead.head.draws.greedy import best_draws
from mlx_flashhead.head.kernel_inputs import MIN_PROBES
from mlx_flashhead.head.metal_operations import MetalOperations

# Words from this one on are places.
PROBED = 0xFFC00000
NOT_A_NUMBER = 0x7FC00000


def run(clustered, hidden, n_probes, **options):
    """All operations, on the kernels."""
    with kernels(**options):
        results = all_operations(MetalOperations(clustered), hidden, n_probes)
        mx.eval(*results)
    return results


def all_operations(operations, hidden, n_probes):
    """Scores, selection, candidates, full logits and greedy token, by ``operations``."""
    scores = operations.route(hidden)
    selection = operations.select(scores, n_probes)
    candidates = operations.score(hidden, selection)
    full = operations.expand(scores, selection, candidates)
    tokens, _ = operations.choose(selection, candidates, best_draws(len(hidden)))
    return scores, selection, candidates, full, tokens


def small_head(rng, *, dtype=mx.float32, scale=0.05, n_tokens=300):
    form = {"bits": 8, "dtype": dtype, "scale": scale, "padded": -n_tokens % 8}
    clustered = make_clustered(rng, -(-n_tokens // 8), 8, 128, **form)
    return clustered, mx.array(rng.normal(size=(5, 128))).astype(dtype)


def check_scores(clustered, hidden, scores):
    expected, error = products(clustered.centroids.matrix, hidden)
    expected = expected + to_numpy(clustered.route_bias).astype(np.float64)
    # the bias is added in float32, and forced ones are 1e30
    error = error + ROUNDING[mx.float32] * np.abs(expected) + 1e-30
    assert scores.dtype == mx.float32
    assert (np.abs(to_numpy(scores) - expected) <= error).all()


def bins_of(scores: np.ndarray) -> np.ndarray:
    """Distances (R, C) to each position's best score in 1/64 nat; 0 for NaN and forced clusters."""
    certain = ~(scores < 1e29)
    scores = np.clip(scores, -np.finfo(np.float32).max, None)
    best = np.where(certain, -np.inf, scores).max(axis=-1, keepdims=True).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        bins = 1 + np.minimum((best - scores) * np.float32(64), 4094)
    return np.where(certain, 0, bins).astype(int)


def n_probes_read(scores, bins, n_probes, depth) -> int:
    """How many probes of a position are read: none deeper than ``depth`` below the sum."""
    deepest = 100
    if depth < 100:
        near = scores[bins > 0]
        deepest = depth - np.log(np.exp(near - near.max()).sum())
    last_bin = 1 + max(deepest, 0) * 64
    return min(n_probes, int((bins <= last_bin).sum()))


def check_selection(clustered, scores, n_probes, selection, depth=100):
    """The first p of a stable sort by bins, ascending, with each cluster's place or estimate, and
    what the others hold."""
    scores = to_numpy(scores)
    held = to_numpy(selection.probes)
    words = to_numpy(selection.words)
    assert held.dtype == words.dtype == np.uint32
    assert held.shape[1] == max(n_probes, MIN_PROBES)
    highest = np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        estimates = scores + to_numpy(clustered.centroids.tail_offset)
    expected = np.clip(estimates, -highest, highest).view(np.uint32)
    expected[np.isnan(estimates)] = NOT_A_NUMBER
    for i, bins in enumerate(bins_of(scores)):
        n_read = n_probes_read(scores[i], bins, n_probes, depth)
        probes = held[i, :n_read]
        np.testing.assert_array_equal(probes, np.sort(np.argsort(bins, kind="stable")[:n_read]))
        assert (held[i, n_read:] == probes[-1]).all()
        expected[i, probes] = PROBED + np.arange(n_read, dtype=np.uint32)
        left = np.clip(np.delete(scores[i], probes).astype(np.float64), -highest, highest)
        best = -highest
        mass = -highest
        if len(left):
            best = left.max()
            mass = np.logaddexp.reduce(left)
        found = [to_numpy(part)[i, 0] for part in selection.unscored]
        np.testing.assert_allclose(found, [best, mass], rtol=1e-5, atol=1e-5)
    # Zeros are of either sign.
    is_zero = (words << 1 == 0) & (expected << 1 == 0)
    np.testing.assert_array_equal(words[~is_zero], expected[~is_zero])


def check_candidates(clustered, hidden, selection, candidates, slack=1e-7):
    """Logits within the error of a float32 sum and one rounding; bests are their exact maxima.

    With a bias the product is rounded before it is added, as the layers of MLX do.
    """
    dtype = clustered.rows.logits_dtype(hidden.dtype)
    assert candidates.logits.dtype == dtype
    probes = to_numpy(selection.probes)
    # Both are (R, C, n).
    every, errors = products(clustered.rows, hidden)
    if clustered.rows.bias is not None:
        errors = errors + ROUNDING[clustered.rows.product_dtype(hidden.dtype)] * np.abs(every)
        every = every + to_numpy(clustered.rows.bias)
    of_probes = (np.arange(len(probes))[:, None], probes)
    highest = mx.finfo(dtype).max
    expected = np.clip(every[of_probes], -highest, highest)
    error = errors[of_probes] + ROUNDING[dtype] * np.abs(expected) + slack
    logits = to_numpy(candidates.logits).astype(np.float64)
    padded = to_numpy(clustered.token_ids)[probes] == clustered.vocab_size
    padded[:, 1:] |= (probes[:, 1:] == probes[:, :-1])[..., None]
    assert (logits[padded] == mx.finfo(dtype).min).all()
    assert (np.abs(logits - expected) <= error)[~padded].all()
    # The kernels give them.
    if candidates.best is not None:
        np.testing.assert_array_equal(to_numpy(candidates.best), logits.max(axis=-1))


def check_full(clustered, scores, selection, candidates, full):
    """Exact, given the outputs of the others: all of it is one sum, one minimum, one rounding."""
    dtype = candidates.logits.dtype
    logits = to_numpy(candidates.logits)
    n_positions, _, cluster_size = logits.shape
    probes = to_numpy(selection.probes)
    slot_of = to_numpy(clustered.slot_of)
    best = logits.reshape(n_positions, -1).max(axis=-1, keepdims=True).astype(np.float32)
    cap = best - np.maximum(np.float32(1), np.abs(best) / np.float32(64))
    tail = np.minimum(to_numpy(scores) + to_numpy(clustered.centroids.tail_offset), cap)
    lowest = mx.finfo(dtype).min
    tail = to_numpy(mx.array(np.maximum(tail, np.float32(lowest))).astype(dtype))
    slots = np.repeat(tail[:, :, None], cluster_size, axis=-1)
    # A probe counts where it stands first.
    for place in reversed(range(probes.shape[1])):
        slots[np.arange(n_positions), probes[:, place]] = logits[:, place]
    assert full.dtype == dtype
    np.testing.assert_array_equal(to_numpy(full), slots.reshape(n_positions, -1)[:, slot_of])
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
