"""What a snapshot of caches that cannot be trimmed costs: the bytes that the next step copies.

Arrays never change in MLX, so that a snapshot itself copies nothing. But while it holds a layer's
arrays, the next write into that layer cannot take place in them: MLX copies the layer. Without a
snapshot the write is in place.

    python scripts/snapshot_cost.py                        # the sliding layers of Gemma-3-1B
    python scripts/snapshot_cost.py --layers 22 --heads 1 --window 512 --width 256
"""

import argparse
import time
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from mlx_flashhead.decoding.caches import copied_layers

REPEATS = 20


def filled(n_layers: int, heads: int, window: int, width: int) -> list[RotatingKVCache]:
    """Caches past their window, which cannot be trimmed any more."""
    caches = [RotatingKVCache(max_size=window, keep=0) for _ in range(n_layers)]
    for _ in range(2):
        for cache in caches:
            rows = mx.zeros((1, heads, window, width), mx.bfloat16)
            cache.update_and_fetch(rows, rows)
    for _ in range(3):
        step(caches, heads, width)
    return caches


def step(caches: Sequence[RotatingKVCache], heads: int, width: int) -> None:
    """One token's keys and values in each layer."""
    row = mx.ones((1, heads, 1, width), mx.bfloat16)
    for cache in caches:
        cache.update_and_fetch(row, row)
    mx.eval([cache.state for cache in caches])


def cost(
    caches: Sequence[RotatingKVCache], heads: int, width: int, *, held: bool
) -> tuple[float, int]:
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
    """Prints the cost with and without a snapshot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22, help="Layers with a window.")
    parser.add_argument("--heads", type=int, default=1, help="Key heads of a layer.")
    parser.add_argument("--window", type=int, default=512, help="Tokens of the window.")
    parser.add_argument("--width", type=int, default=256, help="Of a head.")
    args = parser.parse_args()
    caches = filled(args.layers, args.heads, args.window, args.width)
    held_bytes = sum(array.nbytes for cache in caches for array in cache.state[:2])
    print(f"{args.layers} layers hold {held_bytes / 1e6:.1f} MB")
    for held in (False, True):
        seconds, n_bytes = cost(caches, args.heads, args.width, held=held)
        name = "with a snapshot" if held else "without"
        print(f"{name:>16}: {n_bytes / 1e6:5.1f} MB copied, {1000 * seconds:.2f} ms a step")


if __name__ == "__main__":
    main()
