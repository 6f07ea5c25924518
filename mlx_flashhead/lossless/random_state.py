"""MLX's random state, for samplers of others that draw from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


def set_random_state(state: mx.array) -> None:
    """Makes ``state`` (2,) uint32 MLX's random state. Waits for it."""
    high, low = state.tolist()
    mx.random.seed(high << 32 | low)


@contextmanager
def random_state(state: mx.array | None) -> Iterator[None]:
    """Within the block MLX's random state is ``state``; with None it stays as it is."""
    if state is None:
        yield
        return
    before = mx.random.state[0]
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)
