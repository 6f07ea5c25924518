"""Scored logits are the dense head's to the last bit, as MLX's own kernels compute them.

MLX's text and ours both run on the emulator, which contracts nothing. A GPU's compiler may.
"""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import cluster, kernels, make_centroids, make_rows, on_gpu, to_numpy
from mlx_flashhead.head.kernels import MetalSteps
from mlx_kernels import mlx_logits, parts

pytestmark = [
    pytest.mark.skipif(on_gpu(), reason="the emulator's sums are compared"),
    pytest.mark.skipif(
        "U(x[i]) + U(x[i + 1])" not in parts("quantized.h", "load_vector"),
        reason="this version of MLX adds four hidden values in the model's dtype",
    ),
]

AFFINE = [
    ({"bits": bits, "group_size": group}, hidden_size, n_rows)
    for bits in (4, 8)
    for group, hidden_size, n_rows in ((64, 1024, 160), (64, 576, 160), (32, 1024, 157))
]
MXFP4 = [
    ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, hidden_size, n_rows)
    for hidden_size, n_rows in ((512, 160), (576, 160), (512, 157))
]
FLOATS = [({"bits": 16, "group_size": 0}, hidden_size, 4099) for hidden_size in (576, 1022)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form, hidden_size, n_rows", [*AFFINE, *MXFP4, *FLOATS])
def test_scored_logits_are_those_of_mlxs_kernel(form, hidden_size, n_rows, dtype):
    rng = np.random.default_rng(0)
    rows = make_rows(rng, n_rows, hidden_size, dtype=dtype, **form)
    n_clusters = -(-n_rows // 16)
    centroids = make_centroids(rng, n_clusters, hidden_size, group_size=0)
    clustered = cluster(rng, rows, centroids, 16)
    hidden = mx.array(rng.normal(size=(1, hidden_size))).astype(dtype)
    with kernels(check=False):
        expected = to_numpy(mlx_logits(rows, hidden))
    with kernels():
        steps = MetalSteps(clustered)
        selection = steps.select(mx.zeros((1, n_clusters)), n_clusters)
        found = to_numpy(steps.score(hidden, selection).logits).reshape(1, -1)
    np.testing.assert_array_equal(found[:, to_numpy(clustered.slot_of)], expected)
