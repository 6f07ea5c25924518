"""A model's caches as they were after an earlier token. Those that cannot be trimmed are copied,
which costs nothing: arrays never change in MLX."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

AHEAD = 96  # tokens by which a cache may be ahead of the accepted ones, at most


@dataclass(frozen=True)
class Snapshot:
    n_tokens: int  # of the text, in the caches
    layers: Sequence[Any]  # a copy of each layer's cache; None for one that can be trimmed to here
    offsets: Sequence[int | None]  # the length of each layer's cache, where it is known

    @classmethod
    def take(
        cls, cache: Sequence[Any], n_tokens: int, quantized_from: int | None = None
    ) -> "Snapshot":
        """The caches of one sequence as they are; ValueError if one cannot be copied."""
        layers = copied_layers(cache, quantized_from)
        return cls(n_tokens, layers, [length_of(layer) for layer in cache])


def copied_layers(cache: Sequence[Any], quantized_from: int | None = None) -> list[Any]:
    """A copy of each layer's cache; None for one that can be trimmed. mlx-lm quantizes a cache of
    the length ``quantized_from``. ValueError if a cache cannot be copied."""
    return [None if trims(layer, quantized_from) else _copied(layer) for layer in cache]


def rollback(
    cache: list[Any],
    snapshot: Snapshot,
    tokens: Sequence[int],
    *,
    n_cached: int,
    n_right: int,
    target: int,
    replay: Callable[[list[int]], None],
) -> None:
    """Brings a sequence's caches to its first ``target`` tokens, in place.

    Args:
        cache: The caches of all layers.
        snapshot: At or before the target, and at or before ``n_right``.
        tokens: The accepted tokens.
        n_cached: Tokens that the caches hold now.
        n_right: Those of them that are the accepted ones.
        target: Tokens to hold, fewer or more than now.
        replay: Feeds a token, a list of one, to the model.
    """
    if n_cached == target == n_right:
        return
    start = snapshot.n_tokens
    if all(layer is None for layer in snapshot.layers):
        start = min(target, n_right)
    for i, layer in enumerate(snapshot.layers):
        if layer is not None:
            cache[i] = _copied(layer)
            continue
        length, before = length_of(cache[i]), snapshot.offsets[i]
        ahead = n_cached - start
        if length is not None and before is not None:  # a step that failed has fed some layers
            ahead = length - before - (start - snapshot.n_tokens)
        if ahead > 0:
            cache[i].trim(ahead)
    for place in range(start, target):
        replay(list(tokens[place : place + 1]))


def length_of(layer: Any) -> int | None:
    """Tokens in a layer's cache; None where it does not say."""
    offset = getattr(layer, "offset", None)
    return offset if isinstance(offset, int) else None


def trims(layer: Any, quantized_from: int | None = None, ahead: int = AHEAD) -> bool:
    """Whether a cache can be trimmed now and ``ahead`` tokens later."""
    parts = getattr(layer, "caches", None)
    if parts is not None:
        return all(trims(part, quantized_from, ahead) for part in parts)
    if not hasattr(layer, "is_trimmable") or not layer.is_trimmable():
        return False
    if hasattr(layer, "chunk_size"):  # forgets what is before its chunk
        return False
    offset = length_of(layer)
    if offset is None:  # of a batch
        offset = int(getattr(layer, "_offset", getattr(layer, "_idx", 0)))
    window = getattr(layer, "max_size", None)
    if window is not None and offset + ahead >= window:
        return False
    if quantized_from is None or not hasattr(layer, "to_quantized"):
        return True
    return offset + ahead < quantized_from


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise ValueError(
            f"A cache of the type {type(layer).__name__} can neither be trimmed nor copied, so "
            "choices cannot be verified with it: use verify=False or dense=True."
        ) from error
