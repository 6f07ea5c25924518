"""The file of a prompt's cache, as ``mlx_lm.cache_prompt`` writes it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compat.mlx_lm import QuantizedKVCache, load_prompt_cache


@dataclass(frozen=True)
class CachedPrompt:
    """What such a file holds.

    Attributes:
        layers: The cache of each layer.
        model: The folder or repository of the model.
        tokenizer_config: The arguments with which its tokenizer was loaded.
    """

    layers: list[Any]
    model: str
    tokenizer_config: dict[str, Any]

    def check(self, *, model: str | None, kv_bits: int | None, kv_group_size: int) -> None:
        """Checks that what a user has chosen is what the cache was made with.

        Args:
            model: The folder or repository of a model; None: the cache's own.
            kv_bits: Bits of the cache; None: the cache's own.
            kv_group_size: Values that share a scale in a cache with ``kv_bits``.

        Raises:
            ValueError: If it is something else.
        """
        first = self.layers[0]
        quantized = isinstance(first, QuantizedKVCache)
        if quantized and kv_bits not in (None, first.bits):
            raise ValueError(
                f"`kv_bits` is {kv_bits}, but the cache of `prompt_cache_file` has {first.bits}: "
                "leave it out."
            )
        if quantized and kv_group_size != first.group_size:
            raise ValueError(
                f"`kv_group_size` is {kv_group_size}, but the cache of `prompt_cache_file` has "
                f"{first.group_size}: give that."
            )
        if model and model != self.model:
            raise ValueError(
                f"`model` is {model}, but the cache of `prompt_cache_file` is of {self.model}: "
                "give that one, or leave `model` out."
            )


def read_prompt_cache(file: str) -> CachedPrompt:
    """Reads the file of a prompt's cache.

    Args:
        file: Its path.

    Raises:
        ValueError: If it is not there, or none of ``mlx_lm.cache_prompt``.
    """
    if not Path(file).is_file():
        raise ValueError(f"`prompt_cache_file`: there is no file {file}, check the path.")
    try:
        layers, metadata = load_prompt_cache(file, return_metadata=True)
    except (RuntimeError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"`prompt_cache_file` {file} is damaged, or no safetensors file of a prompt cache: "
            "make it again with mlx_lm.cache_prompt."
        ) from None
    try:
        config = json.loads(metadata["tokenizer_config"])
        return CachedPrompt(layers, metadata["model"], config)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"`prompt_cache_file` {file} does not name its model and tokenizer: make one with "
            "mlx_lm.cache_prompt."
        ) from None
