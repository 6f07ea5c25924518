"""The Metal kernels against numpy in float64, and against the portable path.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import cluster, kernels, make_centroids, make_rows, on_gpu, to_numpy
from kernel_checks import all_operations, check_all, run, small_head
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.noise import Noise
from mlx_flashhead.head.metal_operations import MetalOperations

F32 = mx.float32
F16 = mx.float16
BF16 = mx.bfloat16
FEW = (3, 7, (1, 5, 7))
# Rows (bits, group, mode), D, dtypes of rows and states, cluster size, dtype of a bias, group of
# the centroids; positions, clusters, probes. MLX passes arrays of fewer than 8 elements as
# `constant`. D of 64 to 2,560, and rows that end within a chunk, and begin anywhere.
CASES = [
    ((4, 64), 2048, BF16, BF16, 16, None, 64, (1, 70, (64,))),
    ((4, 64), 640, F32, F32, 8, None, 64, (2, 530, (512,))),
    ((4, 32), 1152, F16, F16, 16, None, 32, (5, 19, (7, 8))),
    ((4, 128), 1024, BF16, BF16, 32, None, 0, (32, 6, (1,))),
    ((4, 64), 384, F16, BF16, 1, BF16, 64, FEW),
    ((4, 64), 384, BF16, BF16, 203, None, 64, FEW),
    ((8, 64), 576, BF16, BF16, 16, None, 64, (5, 21, (8,))),
    ((8, 32), 64, F16, F16, 8, None, 32, (32, 70, (64,))),
    ((8, 128), 2560, F32, F32, 16, None, 64, (1, 21, (8,))),
    ((8, 128), 384, BF16, F16, 18, F16, 64, FEW),
    ((5, 32), 384, BF16, BF16, 16, None, 64, FEW),
    ((6, 64), 384, F16, BF16, 3, BF16, 64, FEW),
    ((4, 32, "mxfp4"), 384, BF16, BF16, 16, None, 64, FEW),
    ((4, 32, "mxfp4"), 384, F32, F32, 5, F32, 64, FEW),
    ((4, 16, "nvfp4"), 384, BF16, BF16, 16, None, 64, FEW),
    ((8, 32, "mxfp8"), 384, BF16, BF16, 5, F32, 64, FEW),
    ((16, 0), 1024, BF16, F32, 16, None, 64, (5, 70, (64,))),
    ((16, 0), 64, F16, F16, 32, None, 32, (2, 5, (5,))),
    ((16, 0), 2560, BF16, BF16, 8, None, 64, (1, 530, (512,))),
    ((16, 0), 384, F16, BF16, 3, F16, 64, FEW),
    ((16, 0), 384, BF16, BF16, 128, BF16, 64, FEW),
    ((32, 0), 384, F32, F32, 16, F32, 64, FEW),
    ((32, 0), 384, F32, BF16, 4, None, 64, FEW),
    ((16, 0), 5, BF16, BF16, 8, None, 0, FEW),
    ((16, 0), 66, BF16, BF16, 8, None, 0, FEW),
    ((16, 0), 1023, BF16, BF16, 8, None, 0, FEW),
]


@pytest.mark.parametrize(
    "form, width, rows_dtype, hidden_dtype, cluster_size, bias_dtype, centroid_group, sizes", CASES
)
def test_steps_match_float64(
    form, width, rows_dtype, hidden_dtype, cluster_size, bias_dtype, centroid_group, sizes
):
    rng = np.random.default_rng(1)
    n_positions, n_clusters, probes = sizes
    n_tokens = n_clusters * cluster_size
    if cluster_size > 2 and n_clusters % 2:
        # Two slots are padded.
        n_tokens -= 2
    form = dict(zip(("bits", "group_size", "mode"), form, strict=False))
    rows = make_rows(rng, n_tokens, width, dtype=rows_dtype, **form)
    if bias_dtype is not None:
        rows = replace(rows, bias=mx.array(rng.normal(size=n_tokens)).astype(bias_dtype))
    centroids = make_centroids(rng, n_clusters, width, group_size=centroid_group)
    clustered = cluster(rng, rows, centroids, cluster_size)
    hidden = mx.array(rng.normal(size=(n_positions, width))).astype(hidden_dtype)
    for n_probes in probes:
        check_all(clustered, hidden, n_probes, run(clustered, hidden, n_probes))


@pytest.mark.skipif(on_gpu(), reason="a GPU's order of threads cannot be chosen")
def test_outputs_do_not_depend_on_the_order_of_threads():
    rng = np.random.default_rng(7)
    clustered, hidden = small_head(rng, dtype=mx.bfloat16, n_tokens=8 * 700 - 1)
    # Many logits are equal.
    hidden = mx.round(hidden * 2)
    settings = (Noise(1.0, 0.5), Noise(0.8, 0.95, top_k=20), Noise(1.3, 0.7))
    draws = Draws.of([(settings[i % 3], (i, 7)) for i in range(5)])
    outputs = []
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffle", 1), ("shuffle", 2)):
        with kernels(order=order, seed=seed):
            operations = MetalOperations(clustered)
            scores, selection, candidates, full, token = all_operations(operations, hidden, 45)
            drawn = operations.choose(selection, candidates, draws)
            selected = selection.probes, selection.words, selection.unscored_input
            outputs.append([scores, *selected, *candidates, full, token, *drawn])
    for others in outputs[1:]:
        for first, other in zip(outputs[0], others, strict=True):
            np.testing.assert_array_equal(to_numpy(first), to_numpy(other))
