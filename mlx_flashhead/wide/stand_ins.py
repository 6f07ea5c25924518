"""Stand-ins for a text's caches while several of its positions are computed in one step.

A stand-in updates the caller's cache as single steps would, and hands out what each of them would
have got. It can bring the cache back to any of these positions.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast

import mlx.core as mx

from ..models.compat.mlx_lm import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from .positions import Positions
from .states import StateStandIn

GROWING = (KVCache, QuantizedKVCache, BatchKVCache)  # whose trimming changes positions alone
OTHERS = (ConcatenateKVCache, ChunkedKVCache)
# Windows hold the latest positions alone, and write over the others. These are their attributes
# that count positions.
WINDOWS: dict[type, tuple[str, ...]] = {
    RotatingKVCache: ("offset", "_idx"),
    BatchRotatingKVCache: ("offset", "_offset", "_idx"),
}
OF_A_BATCH = (BatchKVCache, BatchRotatingKVCache)  # whose masks are always arrays


def parts_of(caches: Iterable[Any]) -> Iterator[Any]:
    """The caches of layers, those in lists one by one."""
    for cache in caches:
        if type(cache) is CacheList:
            yield from parts_of(cache.caches)
        else:
            yield cache


def is_known(cache: Any) -> bool:
    """Whether there is a stand-in for a cache: by its class, not by a subclass of it.

    That of a batch must have one row.
    """
    if type(cache) is ArraysCache:
        return bool(cache.lengths is None and cache.batch_size == 1)
    if type(cache) in OF_A_BATCH:
        return bool(cache.left_padding.size == 1)
    return type(cache) in (*GROWING, *WINDOWS, *OTHERS)


def end_of(cache: Any) -> int:
    """The number of positions that a cache of keys and values counts, padding among them."""
    name = {BatchKVCache: "_idx", BatchRotatingKVCache: "_offset"}.get(type(cache), "offset")
    return cast(int, getattr(cache, name))


def fits(cache: Any, n_positions: int) -> bool:
    """Whether a cache's next positions can be computed together."""
    if type(cache) is ChunkedKVCache:  # forgets its beginning before a step
        return bool(cache.offset - cache.start_position + n_positions <= cache.chunk_size)
    return True


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
    position, since its places are written again: what each update left is kept.
    """

    def __init__(self, cache: Any, n_positions: int):
        super().__init__(cache)
        self.n_positions = n_positions
        self._before = end_of(cache)
        self._past = _numbers(cache)
        self._left: list[dict[str, Any]] = []  # the cache's attributes after each position
        self._is_trimmed = type(cache) in GROWING or _is_straight(cache, n_positions)
        if not self._is_trimmed:
            self._keep_state()

    def make_mask(self, n_positions: int, **options: Any) -> Positions | None:
        """The mask of each position, as a single step would make it; None where all are None."""
        cache = self.cache
        if options.get("window_size") is None and type(cache) not in OF_A_BATCH:
            return None
        probe = copy.copy(cache)
        vars(probe).update(_own_arrays(cache))
        if type(probe) in WINDOWS and probe.keys is not None:  # its places are what matters
            probe.keys = probe.values = mx.zeros((1, 1, cache.keys.shape[2], 1))
        masks = []
        for _ in range(n_positions):
            masks.append(probe.make_mask(1, **options))
            if type(probe) in WINDOWS:
                probe.update_and_fetch(mx.zeros((1, 1, 1, 1)), mx.zeros((1, 1, 1, 1)))
            elif type(probe) is BatchKVCache:
                probe._idx += 1
            else:
                probe.offset += 1
        return None if all(mask is None for mask in masks) else Positions(masks)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Positions, Positions]:
        """The keys and values (1, H, N, D) that each of T positions finds in single steps."""
        found: list[Any] = []
        while len(found) < keys.shape[2]:
            n = self._n_together(keys.shape[2] - len(found))
            some = slice(len(found), len(found) + n)
            whole = self._update(keys[:, :, some], values[:, :, some])
            found += [_without_last(whole, n - 1 - j) for j in range(n)]
            if not self._is_trimmed:
                self._keep_state()
        return Positions(each[0] for each in found), Positions(each[1] for each in found)

    def _n_together(self, n: int) -> int:
        """How many of the next ``n`` positions are written at once, as single steps write them."""
        if not self._is_trimmed:
            return 1
        if self.cache.keys is None:
            room = 0
        else:
            arrays = self.cache.keys if type(self.cache) is QuantizedKVCache else [self.cache.keys]
            room = arrays[0].shape[2] - end_of(self.cache)
        # what grows has room for all of them then, but a window
        return min(n, room) or (1 if type(self.cache) in WINDOWS else n)

    def _update(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Writes positions, and returns what the last of them gets."""
        cache = self.cache
        n = keys.shape[2]
        if type(cache) not in WINDOWS or n == 1:
            return cast(tuple[Any, Any], cache.update_and_fetch(keys, values))
        # several positions by its own method would begin new arrays
        begin = end_of(cache)
        cache.keys[..., begin : begin + n, :] = keys
        cache.values[..., begin : begin + n, :] = values
        for name in WINDOWS[type(cache)]:
            setattr(cache, name, getattr(cache, name) + n)
        return cache.keys[..., : begin + n, :], cache.values[..., : begin + n, :]

    def _keep_state(self) -> None:
        """Keeps the cache as it is. The next update writes into its arrays, not into these."""
        cache = self.cache
        keys, values = (_without_last(each, 0) for each in (cache.keys, cache.values))
        self._left.append(vars(cache) | _own_arrays(cache) | {"keys": keys, "values": values})

    def as_before(self) -> PastStandIn:
        """A cache as it was before this step, for a layer that is called again for its state."""
        return PastStandIn(self._past)

    def back_to(self, n: int) -> None:
        """Brings the cache back to the first ``n`` positions of this step."""
        if self._is_trimmed:
            self.cache.trim(max(0, end_of(self.cache) - self._before - n))
        elif n < len(self._left):
            vars(self.cache).update(self._left[n])


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


class ApartStandIn(_StandIn):
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
        joined = [mx.concatenate(each.parts, axis=2) for each in (keys, values)]
        return self._stand_in.update_and_fetch(*joined)


def apart_stand_in(value: Any) -> Any:
    """An argument with stand-ins as those for code that works position by position."""
    if isinstance(value, KeyValueStandIn):
        return ApartStandIn(value)
    if isinstance(value, ListStandIn):
        return ListStandIn(value.cache, [apart_stand_in(part) for part in value.parts])
    return value


def _is_straight(cache: Any, n_positions: int) -> bool:
    """Whether a window still has all of its text in order after some more positions."""
    if type(cache) not in WINDOWS:
        return False
    end = end_of(cache)
    return bool(cache._idx == end and end + n_positions <= cache.max_size)


def _numbers(cache: Any) -> dict[str, Any]:
    """A cache's attributes but for its keys and values, as they are now."""
    attributes = vars(cache) | _own_arrays(cache)
    return {name: value for name, value in attributes.items() if name not in ("keys", "values")}


def _own_arrays(cache: Any) -> dict[str, mx.array]:
    """Copies of a cache's small arrays, which some updates change in place."""
    arrays = {name: value for name, value in vars(cache).items() if isinstance(value, mx.array)}
    return {name: mx.array(a) for name, a in arrays.items() if name not in ("keys", "values")}


def _without_last(arrays: Any, n: int) -> Any:
    """Arrays of their own with the keys or values of all positions but the last ``n``."""
    if isinstance(arrays, mx.array):
        return arrays[..., : arrays.shape[-2] - n, :]
    return None if arrays is None else [_without_last(array, n) for array in arrays]
