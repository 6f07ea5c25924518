"""MLX's random state, for samplers of others that draw from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx


def current_random_state() -> mx.array:
    """MLX's random state, (2,) uint32. Lazy."""
    state: Any = mx.random.state
    return state[0]


def set_random_state(state: mx.array) -> None:
    """Makes ``state`` (2,) uint32 MLX's random state. Waits for it."""
    high, low = cast(list[int], state.tolist())
    mx.random.seed(high << 32 | low)


@contextmanager
def random_state(state: mx.array | None) -> Iterator[None]:
    """Within the block MLX's random state is ``state``; with None it stays as it is."""
    if state is None:
        yield
        return
    before = current_random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)
