"""Stand-ins for a text's caches while several of its positions are computed in one step.

A stand-in updates the caller's cache as single steps would, and hands out what each of them would
have got. It can bring the cache back to any of these positions.
"""

import copy
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

from ..models.compat.mlx_lm import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from .positions import Positions

GROWING = (KVCache, QuantizedKVCache)  # whose trimming changes an offset alone
STEPWISE = (RotatingKVCache, ConcatenateKVCache, ChunkedKVCache)


def is_known(cache: Any) -> bool:
    """Whether there is a stand-in for a cache: by its class, not by a subclass of it."""
    if type(cache) is CacheList:
        return all(map(is_known, cache.caches))
    if type(cache) is ArraysCache:
        return cache.lengths is None and cache.left_padding is None
    return type(cache) in (*GROWING, *STEPWISE)


def fits(cache: Any, n_positions: int) -> bool:
    """Whether a cache's next positions can be computed together."""
    if type(cache) is CacheList:
        return all(fits(part, n_positions) for part in cache.caches)
    if type(cache) is ChunkedKVCache:  # forgets its beginning before a step
        return bool(cache.offset - cache.start_position + n_positions <= cache.chunk_size)
    return True


def stand_in(cache: Any, n_positions: int) -> Any:
    """The stand-in for a cache, or for each of its parts."""
    if type(cache) is CacheList:
        return ListStandIn(cache, [stand_in(part, n_positions) for part in cache.caches])
    if type(cache) is ArraysCache:
        return ArraysSnapshot(cache)
    return KeyValueStandIn(cache, n_positions)


class _KeysAndValues:
    """The arrays of a cache, which some models exchange."""

    cache: Any

    @property
    def keys(self) -> Any:
        """The keys of all positions."""
        return self.cache.keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self.cache.keys = keys

    @property
    def values(self) -> Any:
        """The values of all positions."""
        return self.cache.values

    @values.setter
    def values(self, values: Any) -> None:
        self.cache.values = values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class KeyValueStandIn(_KeysAndValues):
    """Stands in for a cache of keys and values.

    Arrays that hold several positions are written once. A window past its end is written once per
    position, since its places are written again: what each update left is kept.
    """

    def __init__(self, cache: Any, n_positions: int):
        self.cache = cache
        self.n_positions = n_positions
        self._before = cache.offset
        self._left = [_state(cache)] if type(cache) in STEPWISE else []
        self._fetched: tuple[Positions, Positions] | None = None
        self.given = self

    def make_mask(self, n_positions: int, **options: Any) -> Any:
        """The mask of each position, as a single step would make it; None where all are None."""
        if n_positions == 1:
            return self.cache.make_mask(1, **options)
        if options.get("window_size") is None or not hasattr(self.cache, "make_mask"):
            return None
        probe = _without_contents(self.cache)
        masks = []
        for _ in range(n_positions):
            masks.append(probe.make_mask(1, **options))
            if is_window(probe):
                probe.update_and_fetch(*[mx.zeros((1, 1, 1, 1))] * 2)
            else:
                probe.offset += 1
        return None if all(mask is None for mask in masks) else Positions(masks)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Positions, Positions]:
        """The keys and values (1, H, N, D) that each of T positions finds in single steps."""
        fetched: list[tuple[Any, Any]] = []
        while len(fetched) < keys.shape[2]:
            n = self._n_together(keys.shape[2] - len(fetched))
            some = slice(len(fetched), len(fetched) + n)
            left = _update(self.cache, keys[:, :, some], values[:, :, some])
            for n_later in reversed(range(n)):
                fetched.append(tree_map(lambda array: _first(array, n_later), left))  # noqa: B023
                if self._left:
                    self._left.append(_state(self.cache, n_later))
        self._fetched = (
            Positions(each[0] for each in fetched),
            Positions(each[1] for each in fetched),
        )
        return self._fetched

    def keys_and_values(self) -> tuple[Positions, Positions]:
        """What the update of this step handed out."""
        if self._fetched is None:
            raise TypeError("The keys and values of a cache were read before its update.")
        return self._fetched

    def _n_together(self, n: int) -> int:
        """How many of the next ``n`` positions are written at once, as single steps write them."""
        cache = self.cache
        if type(cache) in GROWING:
            return min(n, _room(cache)) or n  # a longer array has room for all of them
        return max(1, min(n, _room(cache))) if is_window(cache) else 1

    def back_to(self, n: int) -> None:
        """Brings the cache back to the first ``n`` positions of this step."""
        if self._left:
            if len(self._left) > n:
                vars(self.cache).update(self._left[n])
        elif self.cache.offset > self._before + n:
            self.cache.trim(self.cache.offset - self._before - n)


class ArraysSnapshot:
    """A state without values of each position, which can be brought back as a whole."""

    def __init__(self, cache: Any):
        self.given = cache
        self._before = list(cache.cache)

    def back_to(self, n: int) -> None:
        """Brings the state back to what it was before this step."""
        self.given.cache = self._before


class ListStandIn:
    """Stands in for a list of caches of one layer."""

    def __init__(self, cache: Any, parts: list[Any]):
        self.cache = cache
        self.parts = parts
        self.caches = tuple(part.given for part in parts)
        self.given = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def __getitem__(self, index: Any) -> Any:
        return self.caches[index]

    def back_to(self, n: int) -> None:
        """Brings each part back to the first ``n`` positions of this step."""
        for part in self.parts:
            part.back_to(n)


class ApartStandIn(_KeysAndValues):
    """A stand-in for code that has :class:`Positions` in the place of arrays."""

    def __init__(self, stand_in: KeyValueStandIn):
        self.cache = stand_in.cache
        self.given = self
        self._stand_in = stand_in

    @property
    def offset(self) -> Positions:
        """The offset of each position."""
        offset = self.cache.offset
        return Positions(range(offset, offset + self._stand_in.n_positions))

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


def needs_replay(cache: Any) -> bool:
    """Whether a cache can be brought back to the beginning of a step alone."""
    if type(cache) is CacheList:
        return any(map(needs_replay, cache.caches))
    return type(cache) is ArraysCache


def is_window(cache: Any) -> bool:
    """Whether a cache holds the latest positions alone, and writes over the others."""
    return type(cache) is RotatingKVCache


def _room(cache: Any) -> int:
    """Places after a cache's last position that are free."""
    if cache.keys is None:
        return 0
    first = cache.keys[0] if isinstance(cache, QuantizedKVCache) else cache.keys
    n_places: int = first.shape[2]
    if is_window(cache) and (cache._idx != cache.offset or n_places > cache.max_size):
        return 0
    return n_places - cast(int, cache.offset)


def _update(cache: Any, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
    """Writes positions, as single steps write them, and returns what the last of them gets."""
    n = keys.shape[2]
    if not is_window(cache) or n == 1:
        return cast(tuple[Any, Any], cache.update_and_fetch(keys, values))
    # several positions by its own method would begin a new array
    places = slice(cache._idx, cache._idx + n)
    cache.keys[..., places, :] = keys
    cache.values[..., places, :] = values
    cache.offset += n
    cache._idx += n
    return cast(tuple[Any, Any], cache.keys_and_values())


def _first(array: mx.array, n_later: int) -> mx.array:
    """An array of its own with the keys of all positions but the last ``n_later``."""
    return array[..., : array.shape[-2] - n_later, :]


def _state(cache: Any, n_later: int = 0) -> dict[str, Any]:
    """A cache's attributes as they are without its last ``n_later`` positions.

    Its arrays are others than the cache's own, which the next update writes into.
    """
    state = dict(vars(cache))
    for name in ("keys", "values"):
        if state[name] is not None:
            state[name] = _first(state[name], 0)
    for name in ("offset", "_idx"):
        if name in state:
            state[name] -= n_later
    return state


def _without_contents(cache: Any) -> Any:
    """A copy of a cache that knows its places, with keys and values of a single number each."""
    probe = copy.copy(cache)
    if is_window(cache) and cache.keys is not None:
        probe.keys = mx.zeros((1, 1, cache.keys.shape[2], 1))
        probe.values = mx.zeros((1, 1, cache.keys.shape[2], 1))
    return probe
