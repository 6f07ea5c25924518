"""The way back: a model's caches as they were after an earlier token.

A cache is trimmed where it can be. Where it cannot (past the window of a rotating cache, or in a
state-space layer) it is kept as of a confirmed token, and the tokens after it are fed again, one at
a time as before. Arrays never change in MLX: a copy of a cache refers to them, and the next write
makes new ones.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

AHEAD = 96  # tokens by which a cache may be ahead of the confirmed ones, at most


@dataclass(frozen=True)
class Mark:
    """Caches as of one token.

    Attributes:
        n_tokens: Tokens of the text that they hold.
        layers: A copy of each layer's cache; None for one that can be trimmed back to here.
        offsets: The length of each layer's cache, None where it is not known.
    """

    n_tokens: int
    layers: Sequence[Any]
    offsets: Sequence[int | None]


def mark(cache: Sequence[Any], n_tokens: int, quantized_from: int | None = None) -> Mark:
    """Marks the caches.

    Args:
        cache: The cache of each layer.
        n_tokens: Tokens of the text that they hold.
        quantized_from: Length at which mlx-lm quantizes a cache; None: never.

    Raises:
        ValueError: If a cache can neither be trimmed nor copied.
    """
    layers = [None if trims(layer, quantized_from) else _copied(layer) for layer in cache]
    return Mark(n_tokens, layers, [_length(layer) for layer in cache])


def go_back(
    cache: list[Any], marked: Mark, n_tokens: int, wanted: int, feed: Callable[[int], None]
) -> None:
    """Brings caches to an earlier token, in place.

    Args:
        cache: The cache of each layer.
        marked: A mark at or before ``wanted``.
        n_tokens: Tokens of the text that the caches hold.
        wanted: Tokens that they shall hold, fewer or more.
        feed: Called with the place of each token that has to be fed to the model.
    """
    target = wanted if all(layer is None for layer in marked.layers) else marked.n_tokens
    target = min(target, n_tokens)
    for i, layer in enumerate(marked.layers):
        if layer is not None:
            cache[i] = _copied(layer)
            continue
        length, before = _length(cache[i]), marked.offsets[i]
        ahead = n_tokens - target
        if length is not None and before is not None:  # a step that failed has fed some layers
            ahead = length - before - (target - marked.n_tokens)
        if ahead > 0:
            cache[i].trim(ahead)
    for place in range(target, wanted):
        feed(place)


def _length(layer: Any) -> int | None:
    offset = getattr(layer, "offset", None)
    return offset if isinstance(offset, int) else None


def trims(layer: Any, quantized_from: int | None) -> bool:
    """Whether a cache can be trimmed now and after the next tokens."""
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(trims(part, quantized_from) for part in parts)
    if not hasattr(layer, "is_trimmable") or not layer.is_trimmable():
        return False
    if hasattr(layer, "chunk_size"):  # forgets what is before its chunk
        return False
    length = _length(layer)
    offset = length or 0
    if length is None:  # of a batch
        offset = int(getattr(layer, "_offset", getattr(layer, "_idx", 0)))
    window = getattr(layer, "max_size", None)
    if window is not None and offset + AHEAD >= window:
        return False
    if quantized_from is None or not hasattr(layer, "to_quantized"):
        return True
    return offset + AHEAD < quantized_from


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise ValueError(
            f"A cache of the type {type(layer).__name__} can neither be trimmed nor copied, so "
            "choices cannot be checked with it: use check=False or dense=True."
        ) from error
