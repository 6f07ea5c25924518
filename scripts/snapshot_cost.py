"""What a snapshot costs for each kind of cache: the bytes that the next step needs more.

Arrays never change in MLX, so that a snapshot itself copies nothing. But while it holds a layer's
arrays, the next write into that layer cannot take place in them: MLX copies a layer with a window.
A state-space layer has new arrays after each token anyway: a snapshot keeps the old ones in memory.
Of a cache that can be trimmed no snapshot holds an array.

    python scripts/snapshot_cost.py                        # the sliding layers of Gemma-3-1B
    python scripts/snapshot_cost.py --layers 22 --heads 1 --window 512 --width 256
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_flashhead.decoding.caches import copied_layers

REPEATS = 20
KINDS = ("window", "state", "trimmed")


def filled(kind: str, n_layers: int, heads: int, window: int, width: int) -> list[Any]:
    """Caches of a kind that hold as many values: those with a window are past it."""
    caches = [_filled_one(kind, (1, heads, window, width)) for _ in range(n_layers)]
    for _ in range(3):
        step(caches, heads, width)
    return caches


def _filled_one(kind: str, shape: tuple[int, ...]) -> Any:
    """The cache of a layer, with arrays of this shape."""
    rows = mx.zeros(shape, mx.bfloat16)
    if kind == "state":
        state = ArraysCache(2)
        state.cache = [rows, mx.zeros(shape, mx.bfloat16)]
        return state
    if kind == "trimmed":
        trimmed = KVCache()
        trimmed.update_and_fetch(rows, rows)
        return trimmed
    cache = RotatingKVCache(max_size=shape[2], keep=0)
    # The second window turns the first one out.
    cache.update_and_fetch(rows, rows)
    cache.update_and_fetch(rows, rows)
    return cache


def step(caches: Sequence[Any], heads: int, width: int) -> None:
    """One token's keys and values in each layer, or its next state."""
    row = mx.ones((1, heads, 1, width), mx.bfloat16)
    for cache in caches:
        if isinstance(cache, ArraysCache):
            cache.cache = [array * 0.5 + 1 for array in cache.cache]
        else:
            cache.update_and_fetch(row, row)
    mx.eval([arrays_of(cache) for cache in caches])


def arrays_of(cache: Any) -> list[mx.array]:
    """What a layer's cache holds."""
    if isinstance(cache, ArraysCache):
        return list(cache.cache)
    return [cache.keys, cache.values]


def cost(caches: Sequence[Any], heads: int, width: int, *, held: bool) -> tuple[float, int]:
    """Seconds of the first step after a verification, and the bytes it needs more than before.

    Args:
        caches: Those of `filled`.
        heads: Key heads of a layer.
        width: Of a head.
        held: Whether a snapshot holds the caches meanwhile.
    """
    fastest = float("inf")
    n_bytes = 0
    for _ in range(REPEATS):
        snapshot = None
        if held:
            snapshot = copied_layers(list(caches))
        mx.clear_cache()
        before = mx.get_active_memory()
        start = time.perf_counter()
        step(caches, heads, width)
        fastest = min(fastest, time.perf_counter() - start)
        n_bytes = mx.get_active_memory() - before
        del snapshot
    return fastest, n_bytes


def main() -> None:
    """Prints the cost for each kind of cache, with and without a snapshot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22, help="Layers with a cache of the kind.")
    parser.add_argument("--heads", type=int, default=1, help="Key heads of a layer.")
    parser.add_argument("--window", type=int, default=512, help="Tokens of the window.")
    parser.add_argument("--width", type=int, default=256, help="Of a head.")
    args = parser.parse_args()
    shape = args.heads, args.window, args.width
    for kind in KINDS:
        caches = filled(kind, args.layers, *shape)
        held_bytes = sum(array.nbytes for cache in caches for array in arrays_of(cache))
        print(f"{kind}: {args.layers} layers hold {held_bytes / 1e6:.1f} MB")
        for held in (False, True):
            seconds, n_bytes = cost(caches, args.heads, args.width, held=held)
            name = "without"
            if held:
                name = "with a snapshot"
            print(f"{name:>16}: {n_bytes / 1e6:5.1f} MB more, {1000 * seconds:.2f} ms a step")


if __name__ == "__main__":
    main()
