"""The kernel that draws a token: the same token as the definition's, by the same noise."""

import mlx.core as mx
import numpy as np
import pytest

from draw_reference import NONE, draw, noise
from kernel_cases import cluster, kernels, make_centroids, make_rows, on_gpu, to_numpy
from mlx_flashhead.head.draw import Draws
from mlx_flashhead.head.kernels import MIN_PROBES, MetalSteps
from mlx_flashhead.head.steps import Candidates, Selection

LN_20TH = float(np.log(0.05))
SETTINGS = [  # 1/temperature, top_p, log_min_p, top_k
    (0, 1, NONE, 0), (0, 0.5, LN_20TH, 3), (1, 1, NONE, 0), (1.25, 1, NONE, 0), (0.4, 1, NONE, 0),
    (1, 0.1, NONE, 0), (1, 0.5, NONE, 0), (1.25, 0.95, NONE, 0), (0.5, 0.999, NONE, 0),
    (0.3, 1, LN_20TH, 0), (0.3, 1, 0, 0), (0.3, 1, NONE, 1), (0.3, 1, NONE, 5),
    (0.3, 1, NONE, 100_000), (0.3, 0.9, LN_20TH, 20), (0.3, 0.7, NONE, 40), (0.05, 0.99, -9.0, 64),
]  # fmt: skip


def steps_of(rng, cluster_size, n_clusters=50):
    """Steps of a head in which only the token ids matter; two slots are padded if there is room."""
    n_tokens = n_clusters * cluster_size - (2 if cluster_size > 1 else 0)
    rows = make_rows(rng, n_tokens, 4, bits=16, group_size=0, dtype=mx.float16)
    centroids = make_centroids(rng, n_clusters, 4, group_size=0, dtype=mx.float16)
    return MetalSteps(cluster(rng, rows, centroids, cluster_size))


def scored(rng, steps, n_rows, n_probes, dtype, spread=3.0, ties=False):
    """A selection of ``n_probes`` clusters of each row, and random logits of their tokens."""
    clustered = steps.clustered
    probes = [rng.permutation(clustered.n_clusters)[:n_probes] for _ in range(n_rows)]
    probes = np.sort(np.stack(probes), axis=-1)
    held = np.minimum(np.arange(max(n_probes, MIN_PROBES)), n_probes - 1)
    probes = mx.array(probes.astype(np.uint32))
    logits = rng.normal(scale=spread, size=(*probes.shape, clustered.cluster_size))
    logits = mx.array(np.round(logits) if ties else logits).astype(dtype)
    padded = clustered.token_ids[probes] == clustered.vocab_size
    logits = mx.where(padded, mx.finfo(dtype).min, logits)[:, mx.array(held)]
    tail = mx.array(rng.normal(size=(n_rows, 2)).astype(np.float32))
    return Selection(probes[:, mx.array(held)], unscored=tail), candidates_of(logits)


def candidates_of(logits):
    return Candidates(logits, mx.max(logits, axis=-1).astype(mx.float32))


def arguments(rng, settings):
    keys = rng.integers(2**32, size=(len(settings), 2), dtype=np.uint32)
    floats = np.array([setting[:3] for setting in settings], np.float32)
    counts = np.array([setting[3] for setting in settings], np.uint32)
    return Draws(mx.array(floats), mx.array(counts), mx.array(keys))


def drawn_by(steps, case, drawing):
    return steps.choose(*case, case[0].unscored, drawing)[0]


def expected(steps, selection, candidates, settings, top_k, keys, _=True):
    ids = to_numpy(steps.clustered.token_ids)[to_numpy(selection.probes)]
    logits = to_numpy(candidates.logits).astype(np.float32)
    real = ids < steps.clustered.vocab_size
    real[:, 1:] &= ids[:, 1:] != ids[:, :-1]  # not of repeated probes
    tail = to_numpy(selection.unscored)[:, 1]
    drawing = map(to_numpy, (settings, top_k, keys))
    rows = zip(ids, logits, real, tail, *drawing, strict=False)  # settings may have more rows
    return [draw(ids[real], logits[real], *rest) for ids, logits, real, *rest in rows]


def test_noise_is_that_of_mlx():
    for key in ((0, 0), (4294967295, 7), (123, 4000000000)):
        uniform = mx.random.uniform(shape=(2,), key=mx.array(key, dtype=mx.uint32))
        np.testing.assert_array_equal(noise([0, 1], key), -np.log(-np.log(np.array(uniform))))


@pytest.mark.parametrize(
    "dtype, cluster_size",
    [(mx.float32, 1), (mx.float32, 16), (mx.float16, 8), (mx.bfloat16, 1), (mx.bfloat16, 16)],
    ids=str,
)
def test_the_token_is_the_definitions(dtype, cluster_size):
    """Rows of all settings at once, and few rows, whose arrays MLX passes in `constant`."""
    rng = np.random.default_rng(cluster_size)
    with kernels():
        steps = steps_of(rng, cluster_size)
        for n_probes, ties in ((1, False), (7, True), (8, False), (40, False), (40, True)):
            for settings in (SETTINGS, SETTINGS[7:8], SETTINGS[14:17], SETTINGS[6:11]):
                case = scored(rng, steps, len(settings), n_probes, dtype, ties=ties)
                drawing = arguments(rng, settings)
                tokens = drawn_by(steps, case, drawing)
                assert tokens.tolist() == expected(steps, *case, *drawing)
            greedy = steps.token(*case).tolist()
            assert greedy == expected(steps, *case, mx.zeros((5, 3)), *drawing[1:])


@pytest.mark.skipif(on_gpu(), reason="a GPU's order of threads cannot be chosen")
def test_the_token_does_not_depend_on_the_order_of_threads():
    drawn = []
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffle", 1), ("shuffle", 2)):
        rng = np.random.default_rng(5)
        with kernels(order=order, seed=seed):
            steps = steps_of(rng, 16)
            case = scored(rng, steps, len(SETTINGS), 40, mx.bfloat16, ties=True)
            drawn.append(drawn_by(steps, case, arguments(rng, SETTINGS)).tolist())
    assert drawn[1:] == drawn[:1] * 3


def test_values_without_order():
    """NaN, of which the lowest id wins; all logits saturated; a mass that the others hold."""
    rng = np.random.default_rng(3)
    settings = [(1, 0.9, NONE, 4)] * 4
    with kernels():
        steps = steps_of(rng, 8)
        selection, candidates = scored(rng, steps, 4, 9, mx.float32)
        logits = candidates.logits
        logits[0, 3, 2] = logits[0, 5, 1] = float("nan")
        logits[1] *= 1e30
        logits[3] = mx.finfo(mx.float32).min
        tail = mx.array([[0.0, 0.0], [0.0, 0.0], [1e30, 700.0], [0.0, 0.0]])
        case = selection._replace(unscored=tail), candidates_of(logits)
        drawing = arguments(rng, settings)
        found = drawn_by(steps, case, drawing).tolist()
    ids = to_numpy(steps.clustered.token_ids)[to_numpy(selection.probes)]
    assert found[0] == ids[0][[3, 5], [2, 1]].min()
    assert found[3] == ids[3].min()
    case = selection._replace(probes=selection.probes[:3], unscored=tail), candidates_of(logits[:3])
    assert found[1:3] == expected(steps, *case, *drawing)[1:]
