"""The product in blocks, which the CPU's route uses; the steps are tested in `test_head.py`."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flashhead import portable
from mlx_flashhead.portable import blocked_product


@pytest.mark.parametrize("n_states", [1, 3, 32])
@pytest.mark.parametrize("n_rows, hidden_size", [(1, 8), (12, 8), (13, 8), (97, 24), (256, 16)])
@pytest.mark.parametrize("block_products", [1, 50, 500, 100_000])
def test_blocked_product_is_the_product(monkeypatch, n_states, n_rows, hidden_size, block_products):
    monkeypatch.setattr(portable, "BLOCK_PRODUCTS", block_products)
    monkeypatch.setattr(portable, "BLOCKED_ROWS", 3)
    rng = np.random.default_rng(n_rows)
    hidden = rng.normal(size=(n_states, hidden_size)).astype(np.float32)
    weight = rng.normal(size=(n_rows, hidden_size)).astype(np.float32)
    found = blocked_product(mx.array(hidden), mx.array(weight))
    assert found.shape == (n_states, n_rows)
    np.testing.assert_allclose(np.array(found), hidden @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("n_rows", "most", "expected"),
    [(3072, 868, 768), (8016, 244, 167), (9496, 488, 488), (12, 12, 12), (7, 1, 1), (5, 9, 5)],
)
def test_blocks_leave_no_rest_where_they_can(n_rows, most, expected):
    assert portable._block_rows(n_rows, most) == expected
