"""A model's caches, which are trimmed, copied, and brought back to an earlier token.

Between two tokens the caller finds them as mlx-lm's loop would leave them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from typing import Any, cast

import mlx.core as mx

AHEAD = 160  # the most tokens by which a cache is ahead of the caller
# The attributes that trimming changes, for the classes in which it changes no array. mlx-vlm's
# classes have the same names.
POSITIONS = {
    "KVCache": ("offset",),
    "QuantizedKVCache": ("offset",),
    "RotatingKVCache": ("offset", "_idx"),
}
KEEPS_TRIMMED = ("ConcatenateKVCache",)  # mlx-lm's goes on to attend to what was trimmed
OPERATORS = ("__getitem__", "__setitem__", "__len__", "__bool__", "__iter__", "__contains__")


@dataclass(frozen=True)
class Snapshot:
    """A model's caches as they were after an earlier token."""

    n_tokens: int  # tokens of the text that the caches held
    layers: list[Any]  # each layer's cache as it was then; None for one that is trimmed to here
    copies: list[Any]  # a copy of each; None where it is None
    offsets: list[int | None]  # the length of each layer's cache, where it is known
    row: int | None = None  # of the sequence, in caches of a batch


def copied_layers(cache: list[Any], quantized_from: int | None = None) -> list[Any]:
    """Copies each layer's cache, but for those that can be trimmed.

    Args:
        cache: The caches of the model's layers.
        quantized_from: The length from which mlx-lm quantizes a cache; None if it never does.

    Returns:
        A copy of each layer's cache; None for one that can be trimmed.

    Raises:
        ValueError: If a cache cannot be copied.
    """
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
    snapshot: Snapshot,
    tokens: list[int],
    n_right: int,
    n_cached: int,
    target: int,
    replay: Callable[[mx.array], Any],
) -> None:
    """Brings a sequence's caches back from ``n_cached`` tokens to the first ``target``.

    Args:
        cache: The caches of the layers, changed in place. Layers that were replaced since the
            snapshot are put back into the list.
        snapshot: A snapshot from the ``target`` or before.
        tokens: The text's tokens.
        n_right: How many of the cached tokens belong to the text.
        n_cached: Tokens of the text in the caches.
        target: Tokens that the caches hold afterwards.
        replay: Feeds a token (1, 1) to the model.
    """
    n_right = min(n_cached, n_right)
    if n_cached == target == n_right:
        return
    trimmed_only = all(copied is None for copied in snapshot.copies)
    start = min(target, n_right) if trimmed_only else snapshot.n_tokens
    for i, held in enumerate(snapshot.copies):
        if held is not None:
            cache[i] = _restored(snapshot, i)
            continue
        n_ahead = n_cached - start
        length = length_of(cache[i])
        before = snapshot.offsets[i]
        if length is not None and before is not None:  # a step that failed has fed some layers
            n_ahead = length - before - (start - snapshot.n_tokens)
        if n_ahead > 0:
            cache[i].trim(n_ahead)
    for token in tokens[start:target]:
        replay(mx.array([[token]], dtype=mx.uint32))
        mx.eval([layer.state for layer in cache])


def _restored(snapshot: Snapshot, i: int) -> Any:
    """The cache of layer ``i`` as it was. A caller's object stays the same object."""
    if snapshot.row is not None:
        return _copied(snapshot.copies[i].extract(snapshot.row))
    layer = snapshot.layers[i]
    restored = _copied(snapshot.copies[i])
    vars(layer).clear()
    vars(layer).update(vars(restored))
    return layer


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
    if type(layer).__name__ in KEEPS_TRIMMED:
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


class OwnCaches:
    """The caches of one text.

    Between two tokens the caller finds the tokens in them that were handed out, as after mlx-lm's
    loop, although the model is ahead.

    Caches that can be trimmed are trimmed for that moment, which changes their positions and no
    array. Others are brought back from a snapshot when somebody looks at one of them.
    """

    def __init__(self, layers: list[Any], quantized_from: int | None = None):
        self.layers = layers
        self._quantized_from = quantized_from
        # object, attribute, its value ahead, its value as shown
        self._moved: list[tuple[Any, str, int, int]] = []
        self._guarded: list[Any] = []
        self.looked_at = False  # whether the caches were brought back since they were shown

    def snapshots(self, rows: list[tuple[int, int]]) -> list[Snapshot]:
        """Snapshots of rows, given as pairs of a row and the number of its tokens in the caches."""
        copies = copied_layers(self.layers, self._quantized_from)
        lengths = [length_of(layer) for layer in self.layers]
        return [Snapshot(n_tokens, list(self.layers), copies, lengths) for _, n_tokens in rows]

    def extract(self, row: int) -> list[Any]:
        """Returns the text's caches, whatever the row: there is one text."""
        return self.layers

    def drop(self, rows: list[int]) -> None:
        """The only row leaves, and keeps its caches."""

    def join(self, layers: list[Any], n_rows: int = 1) -> None:
        """Takes the caches of a text, which has just been read."""
        self.layers = layers

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Returns the caches of the one text, which need no merging."""
        return caches[0]

    def show(self, n_ahead: int, snapshot: Snapshot, bring_back: Callable[[], None]) -> None:
        """Shows the caches without their last ``n_ahead`` tokens, until :meth:`resume`.

        ``bring_back`` rolls them back for good, from ``snapshot``.
        """
        self.looked_at = False
        if all(held is None for held in snapshot.copies) and all(map(_has_positions, self.layers)):
            for layer in self.layers:
                self._trim(layer, n_ahead)
            return

        def look() -> None:
            self.resume()
            self.looked_at = True
            bring_back()

        # all of them, so that the first look brings back all
        self._guarded = list(self.layers)
        for layer in self._guarded:
            vars(layer)["_flash_look"] = look
            layer.__class__ = _guard_class(cast(Any, type(layer)))

    def _trim(self, layer: Any, n_ahead: int) -> None:
        for part in getattr(layer, "caches", (layer,)):
            for name in POSITIONS[type(part).__name__]:
                ahead = getattr(part, name)
                shown = ahead - n_ahead
                setattr(part, name, shown)
                self._moved.append((part, name, ahead, shown))

    def resume(self) -> bool:
        """Goes on with the caches as they were.

        Returns:
            False if somebody has changed them, or they were brought back: then they stay as they
            are.
        """
        for layer in self._guarded:
            _unguard(layer)
        self._guarded = []
        moved = self._moved
        self._moved = []
        if self.looked_at or any(getattr(part, name) != shown for part, name, _, shown in moved):
            return False
        for part, name, ahead, _ in moved:
            setattr(part, name, ahead)
        return True


class BatchCaches:
    """The caches of several texts, rows of a batch."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._n_rows = 0

    def snapshots(self, rows: list[tuple[int, int]]) -> list[Snapshot]:
        """Returns snapshots as :meth:`OwnCaches.snapshots` does."""
        copies = copied_layers(self.layers)
        unknown: list[int | None] = [None] * len(copies)
        return [Snapshot(n_tokens, [], copies, unknown, row) for row, n_tokens in rows]

    def extract(self, row: int) -> list[Any]:
        """The caches of one row, as a text alone would have them."""
        return [layer.extract(row) for layer in self.layers]

    def drop(self, rows: list[int]) -> None:
        """Takes rows out, all at once: each time copies all caches."""
        kept = [row for row in range(self._n_rows) if row not in rows]
        self._n_rows = len(kept)
        if not kept:
            self.layers = []
        for layer in self.layers:
            layer.filter(kept)

    def join(self, layers: list[Any], n_rows: int = 1) -> None:
        """Adds the rows of another batch."""
        self._n_rows += n_rows
        if not self.layers:
            self.layers = layers
            return
        for layer, other in zip(self.layers, layers, strict=True):
            layer.extend(other)

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Caches of single texts as those of a batch."""
        return [layers[0].merge(layers) for layers in map(list, zip(*caches, strict=True))]


def _has_positions(layer: Any) -> bool:
    parts = getattr(layer, "caches", (layer,))
    return all(type(part).__name__ in POSITIONS for part in parts)


# A cache that the first look at it will bring back has another class until then.


@once
def _guard_class(base: type) -> type:
    def looked(self: Any) -> Any:
        vars_of(self)["_flash_look"]()
        return self

    def get(self: Any, name: str) -> Any:
        return base if name == "__class__" else getattr(looked(self), name)

    def operator(name: str) -> Callable[..., Any]:
        return lambda self, *arguments: getattr(looked(self), name)(*arguments)

    methods: dict[str, Any] = {
        "__getattribute__": get,
        "__setattr__": lambda self, name, value: setattr(looked(self), name, value),
        "__delattr__": lambda self, name: delattr(looked(self), name),
        "__module__": base.__module__,
    }
    methods |= {name: operator(name) for name in OPERATORS if hasattr(base, name)}
    return type(base.__name__, (base,), methods)


def vars_of(guarded: Any) -> dict[str, Any]:
    """The attributes of a guarded cache. This does not count as a look at it."""
    attributes: dict[str, Any] = object.__getattribute__(guarded, "__dict__")
    return attributes


def _unguard(layer: Any) -> None:
    held = vars_of(layer)
    if held.pop("_flash_look", None) is not None:
        object.__setattr__(layer, "__class__", type(layer).__bases__[0])
