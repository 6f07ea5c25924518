"""Scored logits are the dense head's to the last bit, as MLX's own kernels compute them. Both run
on the emulator, whose compiler joins no products and sums, those of an expression, or all that
meet: it is not known what Apple's does."""

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import cluster, kernels, make_centroids, make_rows, on_gpu, to_numpy
from mlx_flashhead.head import dense_kernels
from mlx_flashhead.head.dense_kernels import ANY_ROWS, mlx_version
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.operations import Selection
from mlx_kernels import mlx_logits, parts
from tiny_models import random_clusters

pytestmark = pytest.mark.skipif(on_gpu(), reason="the emulator's sums are compared")

FORMS = [(bits, group) for bits in (4, 5, 6, 8) for group in (64, 32)]
FORMS += [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]
# All sums are float32: rounded to 16 bits they show less.
F32 = [(mx.float32, contract) for contract in ("off", "on", "fast")]
F16 = [(mx.float16, "off"), (mx.bfloat16, "on")]
CASES = [
    *[(form, (576, 160), *case) for form in FORMS for case in F32],
    *[(form, (512, 160), *F32[-1]) for form in FORMS if form[0] % 4 == 0],
    *[(form, (1024, 160), *F32[-1]) for form in FORMS if form[0] % 4],
    *[(form, (512, 157), *F16[i % 2]) for i, form in enumerate(FORMS)],
    *[((4, 64), (512, n_rows), *F32[-1]) for n_rows in (157, 1001)],
    *[((16, 0), (1022, 4099), *case) for case in F32 + F16],
    ((16, 0), (576, 4099), *F32[0]),
]


@pytest.mark.parametrize("form, sizes, dtype, contract", CASES, ids=str)
def test_scored_logits_are_those_of_mlxs_kernel(form, sizes, dtype, contract):
    rng = np.random.default_rng(0)
    hidden_size, n_rows = sizes
    form = dict(zip(("bits", "group_size", "mode"), form, strict=False))
    rows = make_rows(rng, n_rows, hidden_size, dtype=dtype, **form)
    n_clusters = -(-n_rows // 16)
    centroids = make_centroids(rng, n_clusters, hidden_size, group_size=0)
    clustered = cluster(rng, rows, centroids, 16)
    hidden = mx.array(rng.normal(size=(1, hidden_size))).astype(dtype)
    with kernels(check=False, contract=contract):
        expected = to_numpy(mlx_logits(rows, hidden))
    with kernels(contract=contract):
        operations = MetalOperations(clustered)
        selection = Selection(mx.arange(n_clusters, dtype=mx.uint32)[None])
        found = to_numpy(operations.score(hidden, selection).logits).reshape(1, -1)
    np.testing.assert_array_equal(found[:, to_numpy(clustered.slot_of)], expected)


@pytest.mark.parametrize("n_rows, cluster_size", [(1001, 16), (1000, 11)])
def test_dense_logits_are_those_of_mlxs_kernel(monkeypatch, n_rows, cluster_size):
    """Also where MLX up to 0.32.3 has another kernel for the rows with the padded slots."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(dense_kernels, "mlx_version", lambda: (0, 32, 3))
    rows = make_rows(rng, n_rows, 512, bits=4, group_size=64, dtype=mx.float32)
    token_ids = random_clusters(rng, n_rows, cluster_size)
    centroids = make_centroids(rng, len(token_ids), 512, group_size=0)
    hidden = mx.array(rng.normal(size=(1, 512))).astype(mx.float32)
    monkeypatch.setattr(Matrix, "matmul", mlx_logits)
    with kernels(check=False):
        head = FlashHead(rows, token_ids, centroids, n_probes=1, backend="mlx")
        expected = to_numpy(mlx_logits(rows, hidden))
        at_once = to_numpy(head.operations.dense(hidden))
        found = to_numpy(head.dense_logits(hidden))
    np.testing.assert_array_equal(found, expected)
    assert (at_once != expected).any()


def test_the_table_is_that_of_the_installed_mlx():
    """What differs between its lines shows in the texts of the kernels."""
    in_float32 = "U(x[i]) + U(x[i + 1])" in parts("quantized.h", "load_vector")
    any_rows = "partial_rows" in parts("quantized.h", "qmv_fast_impl")
    assert in_float32 == any_rows == (mlx_version() >= ANY_ROWS)


def test_the_share_of_equal_logits_is_reported(monkeypatch):
    """1 beside MLX's kernel; beside its CPU product, whose sums have another order, less."""
    rng = np.random.default_rng(0)
    rows = make_rows(rng, 320, 512, bits=4, group_size=64, dtype=mx.float32)
    token_ids = rng.permutation(320).reshape(20, 16)
    centroids = make_centroids(rng, 20, 512, group_size=64)
    with kernels(check=False):
        head = FlashHead(rows, token_ids, centroids, n_probes=5, backend="metal")
        assert head.scored_logits_agree(mx.float32) < 0.5
        monkeypatch.setattr(head.operations, "dense", lambda hidden: mlx_logits(rows, hidden))
        assert head.scored_logits_agree(mx.float32) == 1
