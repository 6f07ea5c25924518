"""The caches of earlier prompts, by their tokens."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from ...models.compat.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache
from ..catalogue import ServedModel

KVCaches = list[Any]  # of a model's layers, and of its draft model's


class PromptCaches:
    """mlx-lm's store of so many caches, and bytes of these and of those in use together."""

    def __init__(self, max_size: int, max_bytes: int | None):
        self._kept, self._max_bytes = LRUPromptCache(max_size), max_bytes

    def find(self, served: ServedModel, tokens: list[int]) -> tuple[KVCaches | None, int]:
        """A copy of the cache that holds most of a prompt, and its number of tokens.

        It leaves out the prompt's last token, from which the model goes on.
        """
        cache, rest = self._kept.fetch_nearest_cache(served.name, tokens)
        if not rest and can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        elif not rest:
            tokens = tokens[:-1]
            cache, rest = self._kept.fetch_nearest_cache(served.name, tokens)
        return cache, len(tokens) - len(rest)

    def keep(
        self,
        served: ServedModel,
        tokens: list[int],
        cache: KVCaches,
        kind: str = "assistant",
        in_use: Iterable[int] = (),
    ) -> None:
        """Keeps a cache of these tokens, which must not change any more.

        Then drops caches until all fit beside those in use, which have these bytes. Of mlx-lm's
        kinds "system", "user" and "assistant" the last is dropped first.
        """
        if tokens:
            # evaluated, since an unevaluated part of a batch's cache keeps the whole of it
            mx.eval([layer.state for layer in cache])
            self._kept.insert_cache(served.name, tokens, cache, cache_type=kind)
        if self._max_bytes is not None:
            self._kept.trim_to(n_bytes=self._max_bytes - sum(in_use))
