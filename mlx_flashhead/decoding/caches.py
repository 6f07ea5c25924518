"""A model's caches: trimmed, copied, and brought back to an earlier token."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

AHEAD = 96  # tokens by which a cache may be ahead of the accepted ones, at most


@dataclass(frozen=True)
class Snapshot:
    """A model's caches as they were after an earlier token. A copy costs nothing: arrays never
    change in MLX."""

    n_tokens: int  # of the text, in the caches
    layers: list[Any]  # a copy of each layer's cache; None for one that can be trimmed to here
    offsets: list[int | None]  # the length of each layer's cache, where it is known
    row: int | None = None  # of the sequence, in caches of a batch


def copied_layers(cache: list[Any], quantized_from: int | None = None) -> list[Any]:
    """A copy of each layer's cache; None for one that can be trimmed. mlx-lm quantizes a cache of
    the length ``quantized_from``. ValueError if a cache cannot be copied."""
    return [None if trims(layer, quantized_from) else _copied(layer) for layer in cache]


def _copied(layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise ValueError(
            f"A cache of the type {type(layer).__name__} can neither be trimmed nor copied, so "
            "choices cannot be verified with it: use verify=False or dense=True."
        ) from error


def rollback(
    cache: list[Any],
    sequence: Any,
    n_cached: int,
    target: int,
    replay: Callable[[mx.array], Any],
) -> None:
    """Brings a sequence's caches from ``n_cached`` tokens of its text to the first ``target``, in
    place. Its snapshot is at or before these. ``replay`` feeds a token (1, 1)."""
    snapshot, tokens = sequence.snapshot, sequence.tokens
    n_right = min(n_cached, len(tokens) - sequence.rejected)
    if snapshot is None or n_cached == target == n_right:
        return
    start = snapshot.n_tokens
    if all(layer is None for layer in snapshot.layers):
        start = min(target, n_right)
    for i, layer in enumerate(snapshot.layers):
        if layer is not None:
            cache[i] = _copied(layer if snapshot.row is None else layer.extract(snapshot.row))
            continue
        length, before = length_of(cache[i]), snapshot.offsets[i]
        ahead = n_cached - start
        if length is not None and before is not None:  # a step that failed has fed some layers
            ahead = length - before - (start - snapshot.n_tokens)
        if ahead > 0:
            cache[i].trim(ahead)
    for token in tokens[start:target]:
        replay(mx.array([[token]], dtype=mx.uint32))
        mx.eval([layer.state for layer in cache])


def length_of(layer: Any) -> int | None:
    """Tokens in a layer's cache; None where it does not say."""
    offset = getattr(layer, "offset", None)
    return offset if isinstance(offset, int) else None


def trims(layer: Any, quantized_from: int | None = None, ahead: int = AHEAD) -> bool:
    """Whether a cache can be trimmed now and ``ahead`` tokens later."""
    if hasattr(layer, "caches"):
        return all(trims(part, quantized_from, ahead) for part in layer.caches)
    if not hasattr(layer, "is_trimmable") or not layer.is_trimmable():
        return False
    if hasattr(layer, "chunk_size"):  # forgets what is before its chunk
        return False
    offset = length_of(layer)
    if offset is None:  # of a batch
        offset = int(getattr(layer, "_offset", getattr(layer, "_idx", 0)))
    limits = [getattr(layer, "max_size", None)]  # a rotating cache is trimmed within its window
    if hasattr(layer, "to_quantized"):
        limits.append(quantized_from)
    return all(limit is None or offset + ahead < limit for limit in limits)
