"""A held snapshot makes the next write copy each layer with a window, and none that is trimmed."""

import pytest

from snapshot_cost import KINDS, arrays_of, cost, filled


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_step_needs_what_a_snapshot_holds(kind, held):
    caches = filled(kind, 3, 2, 64, 32)
    total = sum(array.nbytes for cache in caches for array in arrays_of(cache))
    _, n_bytes = cost(caches, 2, 32, held=held)
    if held and kind != "trimmed":
        assert n_bytes >= total
    else:
        assert n_bytes < total / 3
