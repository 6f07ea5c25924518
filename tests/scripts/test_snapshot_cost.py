"""A held snapshot makes the next write copy each layer, and none is copied without."""

import pytest

from snapshot_cost import cost, filled


@pytest.mark.parametrize("held", [False, True])
def test_the_next_step_copies_what_a_snapshot_holds(held):
    caches = filled(3, 2, 64, 32)
    total = sum(array.nbytes for cache in caches for array in cache.state[:2])
    _, n_bytes = cost(caches, 2, 32, held=held)
    assert n_bytes >= total if held else n_bytes < total / 3
