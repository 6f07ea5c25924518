"""Caches of earlier prompts: how much of a prompt they hold, and how much room they take."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_flashhead.serving.engine.prompt_caches import PromptCaches

SERVED = SimpleNamespace(name="a model")


def filled(n_tokens, kind=KVCache):
    """A cache of one layer with keys that tell their place."""
    cache = kind()
    keys = mx.arange(n_tokens, dtype=mx.float32).reshape(1, 1, n_tokens, 1)
    cache.update_and_fetch(keys, keys)
    return [cache]


@pytest.mark.parametrize("kind", [KVCache, lambda: RotatingKVCache(max_size=4)])
def test_found_is_as_much_as_the_cache_holds(kind):
    """All but the last token; of a cache that cannot be trimmed, what was kept before."""
    caches = PromptCaches(8, None)
    caches.keep(SERVED, [1, 2, 3], filled(3, kind))
    caches.keep(SERVED, [1, 2, 3, 4, 5, 6], filled(6, kind))
    for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9]):
        cache, done = caches.find(SERVED, tokens)
        assert 3 <= done < len(tokens)
        assert cache[0].offset == done
    assert caches.find(SERVED, [9]) == (None, 0)
    assert caches.find(SimpleNamespace(name="another"), [1, 2, 3, 4]) == (None, 0)


def test_room_is_made_for_caches_in_use():
    size = filled(256)[0].nbytes
    caches = PromptCaches(8, max_bytes=3 * size)
    for number in range(4):
        caches.keep(SERVED, [number, *range(100, 355)], filled(256), in_use=[1] * (number == 3))
    kept = [number for number in range(4) if caches.find(SERVED, [number, 100, 7])[1]]
    assert len(kept) == 2
