"""Products in blocks and by columns, for CPUs; the steps are tested in `test_head.py`."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead.head import portable
from mlx_flashhead.head.clustered import ClusteredRows
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.head.portable import (
    REFERENCE,
    PortableSteps,
    blocked_product,
    faster_by_column,
    in_blocks,
)
from tiny_models import fitted, random_clusters, random_rows


@pytest.mark.parametrize("n_states", [1, 3, 32])
@pytest.mark.parametrize("n_rows, hidden_size", [(1, 8), (12, 8), (13, 8), (97, 24), (256, 16)])
@pytest.mark.parametrize("block_products", [1, 50, 500, 100_000])
def test_blocked_product_is_the_product(monkeypatch, n_states, n_rows, hidden_size, block_products):
    monkeypatch.setattr(portable, "BLOCK_PRODUCTS", block_products)
    rng = np.random.default_rng(n_rows)
    hidden = rng.normal(size=(n_states, hidden_size)).astype(np.float32)
    weight = rng.normal(size=(n_rows, hidden_size)).astype(np.float32)
    found = np.array(blocked_product(mx.array(hidden), in_blocks(Matrix(mx.array(weight)))))
    assert len(found) == n_states and n_rows <= found.shape[1]
    block = in_blocks(Matrix(mx.array(weight))).shape[1]
    assert block * hidden_size <= block_products + 16 * hidden_size
    np.testing.assert_allclose(found[:, :n_rows], hidden @ weight.T, rtol=1e-4, atol=1e-5)
    assert not found[:, n_rows:].any()


@pytest.mark.parametrize(
    ("bits", "dtype", "by_column"),
    [(None, mx.float32, True), (None, mx.bfloat16, False), (None, mx.float16, False),
     (4, mx.float32, False)],
)  # fmt: skip
def test_columns_are_for_what_a_blas_multiplies(bits, dtype, by_column):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 61, 32, bits=bits, dtype=dtype)
    on_cpu = mx.default_device().type == mx.cpu
    assert faster_by_column(rows) == (by_column and on_cpu)
    token_ids = random_clusters(rng, 61, 8)
    head = FlashHead(rows, token_ids, fitted(rows, token_ids), n_probes=2, backend="mlx")
    assert head.clustered.by_column == faster_by_column(rows)


@pytest.mark.parametrize(
    ("blas", "limits"),
    [("OpenBLAS 0.3.29, 1 thread", [32, 12, 1]), (REFERENCE, [32, 32, 32])],
)
def test_with_a_fast_blas_fewer_positions_are_retrieved_the_more_probes(monkeypatch, blas, limits):
    if mx.default_device().type != mx.cpu:
        pytest.skip("the limit of a CPU")
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 3072, 8)
    token_ids = random_clusters(rng, 3072, 4)
    clustered = ClusteredRows.build(rows, token_ids, fitted(rows, token_ids))
    monkeypatch.setattr(portable, "blas_name", lambda: blas)
    steps = PortableSteps(clustered)
    assert [steps.max_positions(n_probes) for n_probes in (8, 64, 768)] == limits
