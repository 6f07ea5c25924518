"""A model's caches, which are trimmed, copied, and brought back to an earlier token.

    mark = Marked(layers, feed)     of a draft model; a wide step is a mark as well
    …                               tokens are fed
    mark.back_to(n)                 the caches after the first n of them

    snapshot = caches.snapshots(…)  of a text in progress, alone or in a batch, which goes back to
    rollback(…, snapshot, …)        any token since, as long as the snapshot is kept

Between two tokens the caller finds them as mlx-lm's loop would leave them.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol, cast

import mlx.core as mx

from ..models.compat.caches import TRIMMED, end_of
from ..models.compat.recognised import are_librarys_caches

AHEAD = 160  # the most tokens by which a cache is ahead of the caller
KEEPS_TRIMMED = ("ConcatenateKVCache",)  # mlx-lm's goes on to attend to what was trimmed


@dataclass(frozen=True)
class Snapshot:
    """A model's caches as they were after an earlier token."""

    n_tokens: int  # tokens of the text that the caches held
    layers: list[Any]  # each layer's cache as it was then; None for one that is trimmed to here
    copies: list[Any]  # a copy of each; None where it is None
    offsets: list[int | None]  # the length of each layer's cache, where it is known
    row: int | None = None  # of the text, in caches of a batch


def copied_layers(cache: list[Any], quantized_from: int | None = None) -> list[Any]:
    """Copies each layer's cache, but for those that can be trimmed.

    Args:
        cache: The caches of the model's layers.
        quantized_from: The length from which mlx-lm quantizes a cache; None if it never does.

    Returns:
        A copy of each layer's cache; None for one that can be trimmed.
    """
    return [None if trims(layer, quantized_from) else copy.deepcopy(layer) for layer in cache]


def rollback(
    cache: list[Any],
    snapshot: Snapshot,
    tokens: list[int],
    n_right: int,
    n_cached: int,
    target: int,
    replay: Callable[[mx.array], Any],
) -> None:
    """Brings a text's caches back from ``n_cached`` tokens to the first ``target``.

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
        return copy.deepcopy(snapshot.copies[i].extract(snapshot.row))
    layer = snapshot.layers[i]
    restored = copy.deepcopy(snapshot.copies[i])
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
    end = end_of(layer)
    limits = [getattr(layer, "max_size", None)]  # a rotating cache is trimmed within its window
    if hasattr(layer, "to_quantized"):
        limits.append(quantized_from)
    return all(limit is None or end + ahead < limit for limit in limits)


class Mark(Protocol):
    """A place to which the caches of one text go back. ``WideStep`` is one, too."""

    def back_to(self, n: int) -> None:
        """Leaves in the caches the first ``n`` of the tokens that were fed since, 0 … all."""


class Marked:
    """Caches as they were before some tokens were fed: those of one text, such as a draft's.

    Args:
        layers: The caches of the layers, changed in place.
        feed: Feeds tokens (1, n) to the model with these caches.
    """

    def __init__(self, layers: list[Any], feed: Callable[[mx.array], Any]):
        self._layers = layers
        self._feed = feed
        self._snapshot = OwnCaches(layers).snapshots([(0, 0)])[0]
        self._tokens: list[mx.array] = []  # (n,) each, fed since

    def feed(self, tokens: mx.array) -> Any:
        """Feeds tokens (n,), and returns what the model gives."""
        self._tokens.append(tokens)
        return self._feed(tokens[None])

    def back_to(self, n: int) -> None:
        """Leaves in the caches the first ``n`` of the tokens that were fed.

        Where a cache cannot be trimmed it is as before them, and they are fed again.
        """
        fed: list[int] = []
        for tokens in self._tokens:
            fed += cast(list[int], tokens.tolist())
        rollback(self._layers, self._snapshot, fed, n, len(fed), n, self._feed)


class Caches(Protocol):
    """The caches in which a decoder's texts go on: :class:`OwnCaches` or :class:`BatchCaches`.

    Attributes:
        layers: Of the model's layers, with a row for each text.
    """

    layers: list[Any]

    def snapshots(self, rows: list[tuple[int, int]]) -> list[Snapshot]:
        """Snapshots of rows, given as pairs of a row and the number of its tokens in the caches."""

    def extract(self, row: int) -> list[Any]:
        """The caches of one row, as a text alone has them."""

    def keep(self, rows: list[int]) -> None:
        """Takes all other rows out."""

    def join(self, layers: list[Any]) -> None:
        """Adds the rows of other caches."""

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Caches of single texts as those that :meth:`join` takes."""


def are_known(cache: Any) -> bool:
    """Whether caches that a caller has given are a list of mlx-lm's own, which can be followed."""
    return type(cache) is list and are_librarys_caches(cache)


class OwnCaches:
    """The caches of one text.

    Between two tokens the caller finds the tokens in them that were handed out, as after mlx-lm's
    loop, although the model is ahead: caches that can be trimmed are trimmed for that moment, which
    changes their positions and no array. Others stay ahead until they are rolled back.
    """

    def __init__(self, layers: list[Any], quantized_from: int | None = None):
        self.layers = layers
        self._quantized_from = quantized_from
        self._moved: list[tuple[Any, str, int]] = []  # object, attribute, its value ahead
        self._left: list[Any] = []  # all objects in the caches, as they were shown

    def snapshots(self, rows: list[tuple[int, int]]) -> list[Snapshot]:
        """Snapshots of rows, given as pairs of a row and the number of its tokens in the caches."""
        copies = copied_layers(self.layers, self._quantized_from)
        lengths = [length_of(layer) for layer in self.layers]
        return [Snapshot(n_tokens, list(self.layers), copies, lengths) for _, n_tokens in rows]

    def extract(self, row: int) -> list[Any]:
        """Returns the text's caches, whatever the row: there is one text."""
        return self.layers

    def keep(self, rows: list[int]) -> None:
        """The only row stays, or leaves and keeps its caches."""

    def join(self, layers: list[Any]) -> None:
        """Takes the caches of a text, which has just been read."""
        self.layers = layers

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Returns the caches of the one text, which need no merging."""
        return caches[0]

    def show(self, n_ahead: int, snapshot: Snapshot) -> bool:
        """Leaves the caches to the caller until :meth:`resume`.

        Args:
            n_ahead: By how many tokens they are ahead.
            snapshot: The earliest one from which they can be rolled back.

        Returns:
            Whether they are shown without these tokens.
        """
        parts = [part for layer in self.layers for part in getattr(layer, "caches", (layer,))]
        trims_all = all(copied is None for copied in snapshot.copies)
        trims_all = trims_all and all(type(part).__name__ in TRIMMED for part in parts)
        for part in parts if trims_all else ():
            for name in TRIMMED[type(part).__name__]:
                ahead = getattr(part, name)
                setattr(part, name, ahead - n_ahead)
                self._moved.append((part, name, ahead))
        self._left = list(_objects(self.layers))
        return trims_all

    def resume(self) -> bool:
        """Goes on with the caches as they were.

        Returns:
            False if something in them was replaced meanwhile: then they stay as they are.
        """
        moved = self._moved
        left = self._left
        self._moved = []
        self._left = []
        if left:
            found = list(_objects(self.layers))
            if len(found) != len(left) or not all(map(is_, found, left)):
                return False
        for part, name, ahead in moved:
            setattr(part, name, ahead)
        return True


def _objects(value: Any) -> Iterator[Any]:
    """All objects within a cache: arrays, numbers, and what holds them."""
    yield value
    if isinstance(value, list | tuple):
        for item in value:
            yield from _objects(item)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _objects(item)


class BatchCaches:
    """The caches of several texts, rows of a batch."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def snapshots(self, rows: list[tuple[int, int]]) -> list[Snapshot]:
        """Returns snapshots as :meth:`OwnCaches.snapshots` does."""
        copies = copied_layers(self.layers)
        unknown: list[int | None] = [None] * len(copies)
        return [Snapshot(n_tokens, [], copies, unknown, row) for row, n_tokens in rows]

    def extract(self, row: int) -> list[Any]:
        """The caches of one row, as a text alone would have them."""
        return [layer.extract(row) for layer in self.layers]

    def keep(self, rows: list[int]) -> None:
        """Takes all other rows out, at once: each time copies all caches."""
        if not rows:
            self.layers = []
        for layer in self.layers:
            layer.filter(rows)

    def join(self, layers: list[Any]) -> None:
        """Adds the rows of another batch."""
        if not self.layers:
            self.layers = layers
            return
        for layer, other in zip(self.layers, layers, strict=True):
            layer.extend(other)

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Caches of single texts as those of a batch."""
        return [layers[0].merge(layers) for layers in map(list, zip(*caches, strict=True))]
