"""The inner names of mlx-lm's caches mean what `compat/cache_positions` takes them to mean."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models import cache as lm_caches

from mlx_flashhead.models.compat.cache_positions import (
    OF_A_BATCH,
    TRIMMED,
    WINDOWS,
    end_of,
    is_in_order,
    move_mask,
    next_slot,
    set_end,
)

SIZE = 8
MAKERS = {
    "KVCache": lm_caches.KVCache,
    "QuantizedKVCache": lambda: lm_caches.QuantizedKVCache(group_size=32),
    "RotatingKVCache": lambda: lm_caches.RotatingKVCache(SIZE, keep=2),
    "ChunkedKVCache": lambda: lm_caches.ChunkedKVCache(SIZE),
    "BatchKVCache": lambda: lm_caches.BatchKVCache([1]),
    "BatchRotatingKVCache": lambda: lm_caches.BatchRotatingKVCache(SIZE, [1]),
}
WINDOW_NAMES = [name for name, make in MAKERS.items() if type(make()) in WINDOWS]


def feed(cache, n, value=1.0):
    """Feeds ``n`` positions (1, 1, n, 32), one by one."""
    for _ in range(n):
        position = mx.full((1, 1, 1, 32), value)
        cache.update_and_fetch(position, position)
    return cache


def attributes(cache):
    """What a cache holds beside its keys and values, as numbers."""
    found = {}
    for name, each in vars(cache).items():
        if name in ("keys", "values"):
            continue
        if isinstance(each, mx.array):
            each = each.tolist()
        found[name] = each
    return found


def changed(before, cache):
    """The names of the attributes that have changed since."""
    return {name for name, value in attributes(cache).items() if before[name] != value}


@pytest.mark.parametrize("name", MAKERS)
def test_the_end_counts_the_positions_that_were_fed(name):
    cache = MAKERS[name]()
    assert end_of(cache) == 0
    for n in range(1, 2 * SIZE):
        assert end_of(feed(cache, 1)) == n


@pytest.mark.parametrize("name", TRIMMED)
def test_trimming_changes_the_attributes_of_the_table_alone(name):
    cache = feed(MAKERS[name](), SIZE - 2)
    before = attributes(cache)
    arrays = cache.keys, cache.values
    assert cache.trim(2) == 2
    assert changed(before, cache) == set(TRIMMED[name])
    assert cache.keys is arrays[0] and cache.values is arrays[1]
    for attribute in TRIMMED[name]:
        assert getattr(cache, attribute) == before[attribute] - 2


@pytest.mark.parametrize("name", WINDOW_NAMES)
def test_a_position_in_a_window_moves_the_attributes_of_the_table_by_one(name):
    cache = feed(MAKERS[name](), SIZE - 2)
    before = attributes(cache)
    numbers = {attribute: mx.array(before[attribute]) for attribute in WINDOWS[type(cache)]}
    feed(cache, 1)
    assert changed(before, cache) == set(numbers)
    for attribute, number in numbers.items():
        assert mx.array_equal(mx.array(getattr(cache, attribute)), number + 1)


@pytest.mark.parametrize("name", WINDOW_NAMES)
def test_a_full_window_writes_at_the_next_slot(name):
    cache = feed(MAKERS[name](), SIZE)
    for value in range(2, 2 * SIZE):
        slot = next_slot(cache)
        feed(cache, 1, value)
        assert (cache.keys[0, 0, :, 0] == value).tolist() == [i == slot for i in range(SIZE)]


@pytest.mark.parametrize("name", WINDOW_NAMES)
def test_a_window_is_in_order_until_it_writes_over_its_beginning(name):
    cache = MAKERS[name]()
    for value in range(1, 2 * SIZE):
        feed(cache, 1, value)
        assert is_in_order(cache) == (value <= SIZE)


@pytest.mark.parametrize("name", ["KVCache", "BatchKVCache"])
def test_the_next_mask_is_that_of_the_next_position(name):
    cache = feed(MAKERS[name](), 5)
    probe = copy.copy(cache)
    masks = []
    for _ in range(4):
        options = {"window_size": 3, "return_array": True}
        masks.append(probe.make_mask(1, **options))
        move_mask(probe)
        assert mx.array_equal(masks[-1], cache.make_mask(1, **options))
        feed(cache, 1)
    assert len({mask.size for mask in masks}) == 4


@pytest.mark.parametrize("name", [*TRIMMED, "BatchKVCache", "BatchRotatingKVCache"])
@pytest.mark.parametrize("length", [SIZE - 2, SIZE])
def test_a_cache_whose_end_is_set_is_one_that_was_fed(name, length):
    fed = feed(MAKERS[name](), length)
    cache = copy.deepcopy(fed)
    set_end(cache, 0, 0)
    assert end_of(cache) == 0
    set_end(cache, length, length)
    expected = attributes(fed)
    # Padding is not counted in a text's own number.
    if type(cache) in OF_A_BATCH:
        expected["offset"] = [length]
    assert attributes(cache) == expected
