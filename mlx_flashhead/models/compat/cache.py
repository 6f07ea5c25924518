"""``mlx_lm.models.cache``: the caches of keys and values."""

from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
