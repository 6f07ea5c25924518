"""Stand-ins for a text's caches while several of its positions are computed in one step.

A stand-in updates the caller's cache as single steps would, and hands out what each of them would
have got. It can bring the cache back to any of these positions.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ..models.compat.cache_positions import (
    OF_A_BATCH,
    WINDOWS,
    end_of,
    is_in_order,
    move_mask,
    next_slot,
)
from ..models.compat.mlx_lm import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
)
from .positions import Positions
from .states import StateStandIn, as_now

# Trimming these changes positions alone. A chunk does not forget its beginning within a step.
GROWING = (KVCache, QuantizedKVCache, BatchKVCache, ChunkedKVCache)
# These do not hold a text of any length.
ENDING = (*WINDOWS, ChunkedKVCache)


def parts_of(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches of layers, those in lists one by one."""
    for cache in caches:
        if type(cache) is CacheList:
            yield from parts_of(cache.caches)
        else:
            yield cache


def has_stand_in(cache: Any) -> bool:
    """Whether there is a stand-in for a cache: by its class, not by a subclass of it.

    That of a batch must have one row.
    """
    if type(cache) is ArraysCache:
        return bool(cache.lengths is None and cache.batch_size == 1)
    if type(cache) in OF_A_BATCH:
        return bool(cache.left_padding.size == 1)
    return type(cache) in (*GROWING, *WINDOWS)


def n_held(cache: Any) -> int:
    """The number of positions from the first one in a growing cache's arrays on."""
    return end_of(cache) - cast(int, getattr(cache, "start_position", 0))


def is_past_end(cache: Any, n_positions: int) -> bool:
    """Whether some of a cache's next positions are written over old ones, as in a window."""
    return type(cache) in WINDOWS and not _is_straight(cache, n_positions)


def fit(caches: Iterable[Any], n_positions: int) -> bool:
    """Whether the next positions of caches can be computed together, in the memory that is left.

    Past the end of a window each position has an array of its own until it has been read.
    """
    n_bytes = 0
    for cache in caches:
        # A chunk forgets its beginning before a step that it has no room for.
        if type(cache) is ChunkedKVCache and n_held(cache) + n_positions > cache.chunk_size:
            return False
        if is_past_end(cache, n_positions):
            n_bytes += n_positions * cache.nbytes
    return not n_bytes or there_is_memory(n_bytes)


def there_is_memory(n_bytes: int) -> bool:
    """Whether a GPU may hold so many more bytes."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    return limit is None or mx.get_active_memory() + n_bytes < int(limit)


def stand_in(cache: Any, n_positions: int) -> Any:
    """What stands in for a cache; ``given`` of it is for the model."""
    if type(cache) is CacheList:
        return ListStandIn(cache, [stand_in(part, n_positions) for part in cache.caches])
    if type(cache) is ArraysCache:
        return StateStandIn(cache, n_positions)
    return KeyValueStandIn(cache, n_positions)


def states_in(stand_ins: Iterable[Any]) -> Iterator[StateStandIn]:
    """The stand-ins for states, those in lists one by one."""
    for each in stand_ins:
        if isinstance(each, StateStandIn):
            yield each
        elif isinstance(each, ListStandIn):
            yield from states_in(each.parts)


class _StandIn:
    """Looks like a cache, whose arrays some models exchange."""

    def __init__(self, cache: Any):
        self.cache = cache
        self.given = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("keys", "values"):
            setattr(self.cache, name, value)
        else:
            super().__setattr__(name, value)


class PastStandIn:
    """Looks like a cache of keys and values as it was before a step, and keeps nothing.

    It is for a layer that is called again for its state alone, whose attention nobody asks for.
    """

    def __init__(self, attributes: dict[str, Any]):
        self.given = self
        vars(self).update(attributes)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What the attention has given."""
        return keys, values


class KeyValueStandIn(_StandIn):
    """Stands in for a cache of keys and values.

    Arrays that hold all positions are written once. A window past its end is written once per
    position, since its places are written again: what was in them is kept.
    """

    def __init__(self, cache: Any, n_positions: int):
        super().__init__(cache)
        self.n_positions = n_positions
        self._before = end_of(cache)
        # The cache's attributes after each position.
        self._numbers = [_numbers(vars(cache))]
        self._written_over: list[_WrittenOver] = []
        self._is_trimmed = not is_past_end(cache, n_positions)

    def make_mask(self, n_positions: int, **options: Any) -> Positions | None:
        """The mask of each position, as a single step would make it; None where all are None."""
        cache = self.cache
        # The masks of a batch are always arrays.
        if options.get("window_size") is None and type(cache) not in OF_A_BATCH:
            return None
        probe = copy.copy(cache)
        vars(probe).update(_numbers(vars(cache)))
        is_window = type(cache) in WINDOWS
        # What a window's slots hold does not matter for its masks.
        nothing = mx.zeros((1, 1, 1, 1))
        if is_window and cache.keys is not None:
            slots = mx.zeros((1, 1, cache.keys.shape[2], 1))
            probe.keys = slots
            probe.values = slots
        masks = []
        for _ in range(n_positions):
            masks.append(probe.make_mask(1, **options))
            if is_window:
                probe.update_and_fetch(nothing, nothing)
            else:
                move_mask(probe)
        if all(mask is None for mask in masks):
            return None
        return Positions(masks)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Positions, Positions]:
        """The keys and values (1, H, N, D) that each of T positions finds in single steps."""
        update = self._write_over
        if self._is_trimmed:
            update = self._update
        found_keys: list[Any] = []
        found_values: list[Any] = []
        n_positions = keys.shape[2]
        while len(found_keys) < n_positions:
            first = len(found_keys)
            n = self._n_together(n_positions - first)
            some = slice(first, first + n)
            all_keys, all_values = update(keys[:, :, some], values[:, :, some])
            for n_later in reversed(range(n)):
                found_keys.append(_without_last(all_keys, n_later))
                found_values.append(_without_last(all_values, n_later))
        return Positions(found_keys), Positions(found_values)

    def _n_together(self, n: int) -> int:
        """How many of the next ``n`` positions are written at once, as single steps write them."""
        if not self._is_trimmed:
            return 1
        room = self._room()
        if room:
            return min(n, room)
        if type(self.cache) in WINDOWS:
            return 1
        # What grows has room for all of them then.
        return n

    def _room(self) -> int:
        """The positions that still fit in the arrays of a growing cache."""
        keys = self.cache.keys
        if keys is None:
            return 0
        if type(self.cache) is QuantizedKVCache:
            keys = keys[0]
        return int(keys.shape[2]) - n_held(self.cache)

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Writes positions, and returns what the last of them gets."""
        cache = self.cache
        n = keys.shape[2]
        if type(cache) not in WINDOWS or n == 1:
            return cast(tuple[Any, Any], cache.update_and_fetch(keys, values))
        # A window's own method would begin new arrays for several positions.
        begin = end_of(cache)
        end = begin + n
        cache.keys[..., begin:end, :] = keys
        cache.values[..., begin:end, :] = values
        for name in WINDOWS[type(cache)]:
            setattr(cache, name, getattr(cache, name) + n)
        return cache.keys[..., :end, :], cache.values[..., :end, :]

    def _write_over(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Writes a position (1, H, 1, D) of a window, and returns what its single step finds.

        What is written over is copied before, since the window would be held by a part of it.
        """
        cache = self.cache
        j = len(self._numbers) - 1
        if not self._written_over or self._written_over[-1].stop <= j:
            written_over = _written_over_by(cache, j, self.n_positions - j)
            self._written_over.append(written_over)
            if written_over.slot is not None:
                keys, values = mx.depends([keys, values], [written_over.keys, written_over.values])
        found = cache.update_and_fetch(keys, values)
        self._numbers.append(_numbers(vars(cache)))
        return cast(tuple[Any, Any], found)

    def as_before(self) -> PastStandIn:
        """A cache as it was before this step, for a layer that is called again for its state."""
        return PastStandIn(self._numbers[0])

    def back_to(self, n: int) -> None:
        """Brings the cache back to the first ``n`` positions of this step."""
        if self._is_trimmed:
            self.cache.trim(max(0, end_of(self.cache) - self._before - n))
        elif n < len(self._numbers):
            for written_over in reversed(self._written_over):
                written_over.put_back(self.cache, n)
            vars(self.cache).update(_numbers(self._numbers[n]))


class _WrittenOver(NamedTuple):
    """What some positions of a step have written over in a window.

    Attributes:
        begin: The first of these positions.
        stop: The first one after them.
        slot: The first slot that was written over; None: the whole arrays are others.
        keys: The keys that were there.
        values: The values that were there.
    """

    begin: int
    stop: int
    slot: int | None
    keys: Any
    values: Any

    def put_back(self, cache: Any, n: int) -> None:
        """Puts it back for all positions but the first ``n``."""
        first = max(n, self.begin)
        if first >= self.stop:
            return
        if self.slot is None:
            cache.keys = self.keys
            cache.values = self.values
            return
        skipped = first - self.begin
        slots = slice(self.slot + skipped, self.slot + self.stop - self.begin)
        cache.keys[..., slots, :] = self.keys[..., skipped:, :]
        cache.values[..., slots, :] = self.values[..., skipped:, :]


def _written_over_by(cache: Any, begin: int, n: int) -> _WrittenOver:
    """What the next positions of a step write over in a window, ``n`` of them or fewer."""
    n_slots = 0
    if cache.keys is not None:
        n_slots = cache.keys.shape[2]
    # It grows into another array, or is cut.
    grows = n_slots < cache.max_size and end_of(cache) >= n_slots
    if grows or n_slots > cache.max_size:
        return _WrittenOver(begin, begin + 1, None, cache.keys, cache.values)
    slot = next_slot(cache)
    n_slots_written = min(n, n_slots - slot)
    slots = slice(slot, slot + n_slots_written)
    keys = mx.contiguous(cache.keys[..., slots, :])
    values = mx.contiguous(cache.values[..., slots, :])
    return _WrittenOver(begin, begin + n_slots_written, slot, keys, values)


class ListStandIn(_StandIn):
    """Stands in for a list of caches of one layer."""

    def __init__(self, cache: Any, parts: list[Any]):
        super().__init__(cache)
        self.parts = parts
        self.caches = tuple(part.given for part in parts)

    def __getitem__(self, index: Any) -> Any:
        return self.caches[index]

    def back_to(self, n: int) -> None:
        """Brings each part back to the first ``n`` positions of this step."""
        for part in self.parts:
            part.back_to(n)

    def as_before(self) -> "ListStandIn":
        """A list like this one for a layer that is called again for its state alone."""
        return ListStandIn(self.cache, [part.as_before() for part in self.parts])


class PerPositionStandIn(_StandIn):
    """A stand-in for code that has :class:`Positions` in the place of arrays."""

    def __init__(self, stand_in: KeyValueStandIn):
        super().__init__(stand_in.cache)
        self._stand_in = stand_in

    @property
    def offset(self) -> Positions:
        """The offset of each position."""
        offset = self.cache.offset
        return Positions(offset + j for j in range(self._stand_in.n_positions))

    def update_and_fetch(self, keys: Positions, values: Positions) -> tuple[Positions, Positions]:
        """The keys and values that each position finds, from those of each position."""
        all_keys = mx.concatenate(keys.parts, axis=2)
        all_values = mx.concatenate(values.parts, axis=2)
        return self._stand_in.update_and_fetch(all_keys, all_values)


def per_position_stand_in(value: Any) -> Any:
    """An argument with stand-ins as those for code that works position by position."""
    if isinstance(value, KeyValueStandIn):
        return PerPositionStandIn(value)
    if isinstance(value, ListStandIn):
        return ListStandIn(value.cache, [per_position_stand_in(part) for part in value.parts])
    return value


def _is_straight(cache: Any, n_positions: int) -> bool:
    """Whether a window still has all of its text in order after some more positions."""
    return is_in_order(cache) and bool(end_of(cache) + n_positions <= cache.max_size)


def _numbers(attributes: dict[str, Any]) -> dict[str, Any]:
    """A cache's attributes but for its keys and values, which stay as they are now."""
    others = {name: each for name, each in attributes.items() if name not in ("keys", "values")}
    return as_now(others)


def _without_last(arrays: Any, n: int) -> Any:
    """Arrays of their own with the keys or values of all positions but the last ``n``."""
    if isinstance(arrays, mx.array):
        return arrays[..., : arrays.shape[-2] - n, :]
    if arrays is None:
        return None
    return [_without_last(array, n) for array in arrays]
