"""Where mlx-lm's caches count their positions.

Read in mlx-lm 0.31.3 and 0.32.2 (``mlx_lm.models.cache``), and mlx-vlm 0.7.8 to 0.7.10, whose
classes have the same names. Of the names that are not public:

- ``_idx`` is the place in the arrays at which the next position is written, in the caches of a
  batch and in windows. It is ``max_size`` where a window is about to begin again.
- ``_offset`` is the number of positions in a batch's window, padding among them. Its ``offset`` is
  an array with a number for each text.
"""

from typing import Any

import mlx.core as mx

from .mlx_lm import BatchKVCache, BatchRotatingKVCache, RotatingKVCache

# Windows hold the latest positions alone, and write over the others. These are their attributes
# that count positions.
WINDOWS: dict[type, tuple[str, ...]] = {
    RotatingKVCache: ("offset", "_idx"),
    BatchRotatingKVCache: ("offset", "_offset", "_idx"),
}
# The attributes that trimming changes, by the names of the classes in which it changes no array.
TRIMMED = {
    "KVCache": ("offset",),
    "QuantizedKVCache": ("offset",),
    "RotatingKVCache": WINDOWS[RotatingKVCache],
}
# The names of classes that go on to attend to what was trimmed.
KEEPS_TRIMMED = ("ConcatenateKVCache",)
OF_A_BATCH = (BatchKVCache, BatchRotatingKVCache)


def end_of(cache: Any) -> int:
    """The number of positions that a cache of keys and values counts, padding among them."""
    offset = getattr(cache, "offset", None)
    if isinstance(offset, int):
        return offset
    return int(getattr(cache, "_offset", getattr(cache, "_idx", 0)))


def set_end(cache: Any, length: int, n_slots: int) -> None:
    """Notes in a cache that it holds the latest ``n_slots`` of ``length`` positions, in order."""
    cache.offset = length
    if type(cache) in OF_A_BATCH:
        cache.offset = mx.array([length])
    if hasattr(cache, "_idx"):
        cache._idx = n_slots
    if hasattr(cache, "_offset"):
        cache._offset = length


def move_mask(cache: Any) -> None:
    """Has the next mask of a cache that is no window be that of the position after."""
    if type(cache) is BatchKVCache:
        cache._idx += 1
    else:
        cache.offset += 1


def next_slot(window: Any) -> int:
    """The place in a window's arrays, which are full, that its next position is written over."""
    slot: int = window._idx
    if slot == window.max_size:
        return getattr(window, "keep", 0)
    return slot


def is_in_order(window: Any) -> bool:
    """Whether a window holds all of its text, each position at its own place."""
    return bool(window._idx == end_of(window))
