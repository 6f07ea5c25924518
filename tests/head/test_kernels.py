"""The Metal kernels against numpy in float64, and against the portable path.

On a Mac they run on the GPU, elsewhere on the emulator, with the same assertions.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import (
    cluster,
    covering_cases,
    kernels,
    make_centroids,
    make_clustered,
    make_rows,
    on_gpu,
    to_numpy,
)
from kernel_checks import all_steps, check_all, run, small_head
from mlx_flashhead.head.draw import Draws, DrawSettings
from mlx_flashhead.head.kernels import MetalSteps

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


def head_of(rng, case, dtype):
    n_clusters = N_CLUSTERS[case["n_probes"]]
    rows_dtype = mx.bfloat16 if dtype == mx.float32 and case["bits"] == 16 else dtype
    form = {name: case[name] for name in ("bits", "group_size", "centroid_group")}
    form |= {"dtype": rows_dtype, "padded": 0 if case["divisible"] else 3}
    return make_clustered(rng, n_clusters, case["cluster_size"], case["hidden_size"], **form)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_steps_match_float64(case):
    rng = np.random.default_rng(0)
    dtype = getattr(mx, case["dtype"])
    clustered = head_of(rng, case, dtype)
    hidden = mx.array(rng.normal(size=(case["batch"], case["hidden_size"]))).astype(dtype)
    n_probes = clustered.n_clusters if case["n_probes"] == "C" else case["n_probes"]
    check_all(clustered, hidden, n_probes, run(clustered, hidden, n_probes))


F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16


@pytest.mark.parametrize(
    "form, width, rows_dtype, hidden_dtype, cluster_size, bias_dtype",
    [
        ((4, 32, "mxfp4"), 384, BF16, BF16, 16, None),
        ((4, 32, "mxfp4"), 384, F32, F32, 5, F32),
        ((4, 16, "nvfp4"), 384, BF16, BF16, 16, None),
        ((8, 32, "mxfp8"), 384, BF16, BF16, 5, F32),
        ((5, 32), 384, BF16, BF16, 16, None),
        ((6, 64), 384, F16, BF16, 3, BF16),
        ((32, 0), 384, F32, F32, 16, F32),
        ((32, 0), 384, F32, BF16, 4, None),
        ((16, 0), 384, F16, BF16, 3, F16),
        ((16, 0), 384, BF16, BF16, 128, BF16),
        ((4, 64), 384, BF16, BF16, 203, None),
        ((4, 64), 384, F16, BF16, 1, BF16),
        ((8, 128), 384, BF16, F16, 18, F16),
        # a row may end within a chunk, and begin anywhere
        ((16, 0), 5, BF16, BF16, 8, None),
        ((16, 0), 66, BF16, BF16, 8, None),
        ((16, 0), 1023, BF16, BF16, 8, None),
    ],
)
def test_other_rows_widths_dtypes_biases_and_cluster_sizes(
    form, width, rows_dtype, hidden_dtype, cluster_size, bias_dtype
):
    rng = np.random.default_rng(1)
    n_clusters, n_tokens = 7, 7 * cluster_size - (2 if cluster_size > 2 else 0)
    form = dict(zip(("bits", "group_size", "mode"), form, strict=False))
    rows = make_rows(rng, n_tokens, width, dtype=rows_dtype, **form)
    if bias_dtype is not None:
        rows = replace(rows, bias=mx.array(rng.normal(size=n_tokens)).astype(bias_dtype))
    centroids = make_centroids(rng, n_clusters, width, group_size=0 if width % 64 else 64)
    clustered = cluster(rng, rows, centroids, cluster_size)
    hidden = mx.array(rng.normal(size=(3, width))).astype(hidden_dtype)
    for n_probes in (1, 5, n_clusters):
        check_all(clustered, hidden, n_probes, run(clustered, hidden, n_probes))


@pytest.mark.skipif(on_gpu(), reason="a GPU's order of threads cannot be chosen")
def test_outputs_do_not_depend_on_the_order_of_threads():
    rng = np.random.default_rng(7)
    clustered, hidden = small_head(rng, dtype=mx.bfloat16, n_tokens=8 * 700 - 1)
    hidden = mx.round(hidden * 2)  # ties
    settings = (DrawSettings(1.0, 0.5), DrawSettings(0.8, 0.95, top_k=20), DrawSettings(1.3, 0.7))
    draws = Draws.of([(settings[i % 3], (i, 7)) for i in range(5)])
    outputs = []
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffle", 1), ("shuffle", 2)):
        with kernels(order=order, seed=seed):
            steps = MetalSteps(clustered)
            results = all_steps(steps, hidden, 45)
            drawn = steps.choose(results[1], results[2], results[1].unscored, draws)
            mx.eval(results, drawn)
        outputs.append((*results, drawn))
    flat = [[s, *e, *c, f, t, *d] for s, e, c, f, t, d in outputs]
    for others in flat[1:]:
        for first, other in zip(flat[0], others, strict=True):
            np.testing.assert_array_equal(to_numpy(first), to_numpy(other))
