"""The caches of earlier prompts, where mlx-lm's would not fit the prompt that they are kept for."""

from typing import Any

from ..models.compat import LRUPromptCache


class PromptCaches(LRUPromptCache):
    """mlx-lm's, in two cases as its server needs them.

    A prompt that is held to its last token would leave nothing to generate from. And after a
    request with a draft model the caches hold fewer tokens than were generated: kept under all of
    them, they would be cut in the wrong place.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]):
        """As mlx-lm's: ``(cache or None, tokens that it does not hold)``, at least one of these."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, tokens[-1]]

    def insert_cache(self, model, tokens, prompt_cache, *, cache_type="assistant") -> None:
        """As mlx-lm's; ``model`` is the paths of the model, its adapters and its draft model."""
        if model[2] is not None:
            if not all(hasattr(c, "offset") and c.is_trimmable() for c in prompt_cache):
                return
            held = min(len(tokens), *(c.offset for c in prompt_cache))
            for cache in prompt_cache:
                cache.trim(cache.offset - held)
            tokens = tokens[:held]
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
