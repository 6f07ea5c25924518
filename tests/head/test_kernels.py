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
    make_centroids,
    make_rows,
    on_gpu,
    to_numpy,
)
from kernel_checks import check_all, check_selection, run, small_head
from mlx_flashhead.head.formats import FORMATS
from mlx_flashhead.head.kernels import unread
from mlx_flashhead.head.portable import PortableSteps
from mlx_flashhead.head.steps import Candidates, Selection

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


@pytest.mark.parametrize("hidden_size", [5, 66, 1023])
def test_floats_of_any_width(hidden_size):
    """A row may end within a chunk, and begin anywhere."""
    rng = np.random.default_rng(13)
    rows = make_rows(rng, 157, hidden_size, bits=16, group_size=0, dtype=mx.bfloat16)
    centroids = make_centroids(rng, 20, hidden_size, group_size=0)
    clustered = cluster(rng, rows, centroids, 8)
    hidden = mx.array(rng.normal(size=(3, hidden_size))).astype(mx.bfloat16)
    check_all(clustered, hidden, 9, run(clustered, hidden, 9))


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
