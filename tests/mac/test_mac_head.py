"""What a head is measured for on each generation of Apple GPUs."""

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from kernel_cases import make_clustered
from mlx_flashhead import get_flash_head
from mlx_flashhead.decoding.policy import least_gain
from mlx_flashhead.head.operations import PortableOperations
from mlx_flashhead.head.proposal import Selection
from mlx_flashhead.head.rounded_product import product_size
from mlx_flashhead.models.install import hidden_dtype
from pretended_gpu import CHIPS, pretended_gpu

# The oldest environment has no compiler for the emulator.
pytestmark = pytest.mark.newest
SIZES = [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("gpu", CHIPS, indirect=True)
def test_products_have_sizes_whose_rounding_is_measured(gpu, pair):
    """A scored logit is the dense one, and only an M5 has ten bits of a float32 state."""
    model = pair.flash[0]
    dtype = hidden_dtype(model)
    bounds = get_flash_head(model).measure_rounding(dtype)
    assert [*bounds] == SIZES
    assert {each.scored for each in bounds.values()} == {0.0}
    filled = [product_size(k) for k in (1, 2, 3, 5, 9, 32, 33)]
    assert filled == [1, 2, 4, 8, 16, 32, 64]
    if gpu.emulator is not None and dtype == mx.float32:
        assert all(2**-10 < bounds[size].product < 2**-8 for size in SIZES[1:])
        assert bounds[1].product < 2**-12


def test_a_gpu_without_metal_gathers_rows_of_16_bits():
    """A CPU copies them."""
    rng = np.random.default_rng(0)
    with pretended_gpu(metal=False):
        clustered = make_clustered(rng, 20, 8, 64, bits=16, group_size=0, dtype=mx.bfloat16)
        operations = PortableOperations(clustered)
        hidden = mx.random.normal((1, 64)).astype(mx.bfloat16)
        selection = Selection(mx.array([[3, 11, 7]], mx.uint32))
        with mock.patch.object(mx, "gather_mm", wraps=mx.gather_mm) as gathered:
            found = operations.score(hidden, selection).logits
        assert gathered.call_count == 1
    rows = clustered.rows.weight[selection.probes[0]].astype(mx.float32)
    expected = (rows @ hidden[0].astype(mx.float32)[:, None])[..., 0]
    assert mx.allclose(found[0].astype(mx.float32), expected, rtol=1e-2, atol=1e-2)


def test_a_gpu_needs_less_gain_than_a_cpu(gpu):
    assert least_gain() == 1.03
