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
    caches: list[Any]
    if kind == "state":
        caches = [ArraysCache(2) for _ in range(n_layers)]
        for cache in caches:
            cache.cache = [mx.zeros((1, heads, window, width), mx.bfloat16) for _ in range(2)]
    elif kind == "trimmed":
        caches = [KVCache() for _ in range(n_layers)]
    else:
        caches = [RotatingKVCache(max_size=window, keep=0) for _ in range(n_layers)]
    for cache in caches * (kind != "state"):
        for _ in range(1 if kind == "trimmed" else 2):
            rows = mx.zeros((1, heads, window, width), mx.bfloat16)
            cache.update_and_fetch(rows, rows)
    for _ in range(3):
        step(caches, heads, width)
    return caches


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
    return list(cache.cache) if isinstance(cache, ArraysCache) else [cache.keys, cache.values]


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
        snapshot = copied_layers(list(caches)) if held else None
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
            name = "with a snapshot" if held else "without"
            print(f"{name:>16}: {n_bytes / 1e6:5.1f} MB more, {1000 * seconds:.2f} ms a step")


if __name__ == "__main__":
    main()
