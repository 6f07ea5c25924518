"""A model's caches, which are trimmed, copied, and brought back to an earlier token.

    mark, = caches.marks([text])        of a text alone, of one of a batch, of a draft model
    caches.feed(tokens, caches.layers)  (R, n) → (R, n, V), any number of times
    mark.back_to(k)                     the caches after the first k of the text's tokens since

Between two tokens the caller finds them as mlx-lm's loop would leave them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any, Protocol

import mlx.core as mx

from ..models.compat.cache_positions import KEEPS_TRIMMED, TRIMMED, end_of
from ..models.compat.recognised import are_librarys_caches

# The most tokens by which a cache is ahead of the caller.
AHEAD = 160

# Feeds tokens (R, n) to the model with the caches of its layers: logits (R, n, V).
Feed = Callable[[mx.array, list[Any]], mx.array]


class Mark(Protocol):
    """A place in the caches of one text, to which they go back.

    It is made before tokens (n,) are fed, in one call or several. Layers that can be trimmed are
    trimmed. How others go back differs:

    - Of a text, alone or in a batch, and of a draft model (:class:`TextMark`): they are as
      they were at the mark, and the tokens since then are fed again.
    - Of a wide step (:class:`mlx_flashhead.wide.step.WideStep`): what a window has written over is
      put back, and states are made anew of the calls that have written them, without a weight.
    - Of a trained drafter (:class:`mlx_flashhead.models.drafter_in_text.PairsMark`): all of its
      layers can be trimmed.

    So a text with a state-space layer replays tokens after a proposal of a single step that was
    rejected. To go back without would mean to record the calls of layers at every token.
    """

    def back_to(self, n: int) -> list[Any]:
        """Leaves in the caches the first ``n`` of the tokens that were fed since, 0 … all.

        Returns:
            The caches of the layers, as a text alone has them: of one of a batch, copies.
        """


class CachedText(Protocol):
    """Whose tokens the caches hold: a text, or what drafts in one."""

    @property
    def n_cached(self) -> int:
        """How many of its tokens are in the caches."""

    @property
    def fed(self) -> list[int]:
        """These tokens, as far as they are known."""


class TextMark:
    """The mark of a text: a copy of each layer that cannot be trimmed.

    Args:
        text: Whose tokens are fed.
        caches: The caches that hold them.
        copies: As of :func:`copied_layers`.
        lengths: The length of each layer's cache at the mark; None where it is not known.
        layers: The layers at the mark, which are objects of the caller; None for copies of a batch.
        index: Of the text in these copies.

    Attributes:
        n_tokens: The text's tokens that the caches held at the mark.
    """

    def __init__(
        self,
        text: CachedText,
        caches: "Caches",
        copies: list[Any],
        lengths: list[int | None],
        *,
        layers: list[Any] | None = None,
        index: int = 0,
    ):
        self.n_tokens = text.n_cached
        self._text = text
        self._caches = caches
        self._copies = copies
        self._lengths = lengths
        self._layers = layers
        self._index = index

    @property
    def trims_all(self) -> bool:
        """Whether all layers can be trimmed."""
        return all(copied is None for copied in self._copies)

    def back_to(self, n: int) -> list[Any]:
        """Leaves in the caches the first ``n`` of the tokens that were fed since.

        Layers that were replaced meanwhile are put back into the list.

        Returns:
            The caches of the layers, as a text alone has them: of one of a batch, copies.
        """
        text = self._text
        layers = self._caches.extract(text)
        n_fed = text.n_cached - self.n_tokens
        if n == n_fed:
            return layers
        n_kept = 0
        if self.trims_all:
            n_kept = n
        for i, copied in enumerate(self._copies):
            if copied is None:
                self._trim(i, layers[i], n_fed, n_kept)
            else:
                layers[i] = self._as_it_was(i)
        if n_kept < n:
            for token in text.fed[self.n_tokens + n_kept : self.n_tokens + n]:
                self._caches.feed(mx.array([[token]], dtype=mx.uint32), layers)
                mx.eval([layer.state for layer in layers])
        return layers

    def _trim(self, i: int, layer: Any, n_fed: int, n_kept: int) -> None:
        """Trims layer ``i`` to the first ``n_kept`` of the tokens since the mark."""
        length = length_of(layer)
        before = self._lengths[i]
        # A step that failed has fed some layers and not others.
        if length is not None and before is not None:
            n_fed = length - before
        if n_fed > n_kept:
            layer.trim(n_fed - n_kept)

    def _as_it_was(self, i: int) -> Any:
        """The cache of layer ``i`` at the mark. A caller's object stays the same object."""
        if self._layers is None:
            return copy.deepcopy(self._copies[i].extract(self._index))
        layer = self._layers[i]
        restored = copy.deepcopy(self._copies[i])
        vars(layer).clear()
        vars(layer).update(vars(restored))
        return layer


def copied_layers(layers: list[Any], quantized_from: int | None = None) -> list[Any]:
    """Copies each layer's cache, but for those that can be trimmed.

    Args:
        layers: The caches of the model's layers.
        quantized_from: The length from which mlx-lm quantizes a cache; None if it never does.

    Returns:
        A copy of each layer's cache; None for one that can be trimmed.
    """
    copies = []
    for layer in layers:
        copied = None
        if not trims(layer, quantized_from):
            copied = copy.deepcopy(layer)
        copies.append(copied)
    return copies


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
    # It forgets what is before its chunk.
    if hasattr(layer, "chunk_size"):
        return False
    end = end_of(layer)
    # A rotating cache is trimmed within its window.
    limits = [getattr(layer, "max_size", None)]
    if hasattr(layer, "to_quantized"):
        limits.append(quantized_from)
    return all(limit is None or end + ahead < limit for limit in limits)


class Caches(Protocol):
    """The caches in which R texts go on: :class:`OwnCaches` or :class:`BatchCaches`.

    Attributes:
        layers: Of the model's layers, with a place for each text.
        feed: Feeds tokens (R, n) to the model with these layers, or with others of its texts:
            logits (R, n, V).
    """

    layers: list[Any]
    feed: Feed

    def marks(self, texts: Sequence[CachedText]) -> list[TextMark]:
        """Marks of some texts at the tokens that their caches hold."""

    def extract(self, text: CachedText) -> list[Any]:
        """The caches of one text, as if it were alone."""

    def keep(self, texts: Sequence[CachedText]) -> None:
        """Takes all other texts out."""

    def join(self, texts: Sequence[CachedText], layers: list[Any]) -> None:
        """Adds texts, with their caches."""

    def merged(self, caches: list[list[Any]]) -> list[Any]:
        """Caches of single texts as those that :meth:`join` takes."""


def are_known(cache: object) -> bool:
    """Whether caches that a caller has given are a list of mlx-lm's own, which can be followed."""
    return type(cache) is list and are_librarys_caches(cache)


class OwnCaches:
    """The caches of one text.

    Between two tokens the caller finds the tokens in them that were handed out, as after mlx-lm's
    loop, although the model is ahead: caches that can be trimmed are trimmed for that moment, which
    changes their positions and no array. Others stay ahead until they are rolled back.

    Args:
        layers: Of the model's layers.
        feed: Feeds tokens (1, n) to the model with these.
        quantized_from: The length from which mlx-lm quantizes them; None if it never does.
    """

    def __init__(self, layers: list[Any], feed: Feed, quantized_from: int | None = None):
        self.layers = layers
        self.feed = feed
        self._quantized_from = quantized_from
        # What :meth:`show` has changed: an object, its attribute, and the value of that ahead.
        self._moved: list[tuple[Any, str, int]] = []
        # All objects in the caches, as they were shown.
        self._left: list[Any] = []

    def marks(self, texts: Sequence[CachedText]) -> list[TextMark]:
        """A mark of the only text at the tokens that the caches hold; none for no text."""
        if not texts:
            return []
        copies = copied_layers(self.layers, self._quantized_from)
        lengths = [length_of(layer) for layer in self.layers]
        return [TextMark(text, self, copies, lengths, layers=list(self.layers)) for text in texts]

    def extract(self, text: CachedText) -> list[Any]:
        """Returns the caches, whatever the text: there is one."""
        return self.layers

    def keep(self, texts: Sequence[CachedText]) -> None:
        """The only text stays, or leaves and keeps its caches."""

    def join(self, texts: Sequence[CachedText], layers: list[Any]) -> None:
        """Takes the caches of a text, which has just been read."""
        self.layers = layers

    @staticmethod
    def merged(caches: list[list[Any]]) -> list[Any]:
        """Returns the caches of the one text, which need no merging."""
        return caches[0]

    def show(self, n_ahead: int, mark: TextMark) -> bool:
        """Leaves the caches to the caller until :meth:`resume`.

        Args:
            n_ahead: By how many tokens they are ahead.
            mark: The earliest one to which they can go back.

        Returns:
            Whether they are shown without these tokens.
        """
        parts = [part for layer in self.layers for part in getattr(layer, "caches", (layer,))]
        trims_all = mark.trims_all and all(type(part).__name__ in TRIMMED for part in parts)
        if trims_all:
            for part in parts:
                self._move(part, n_ahead)
        self._left = list(_objects(self.layers))
        return trims_all

    def _move(self, part: Any, n_ahead: int) -> None:
        for name in TRIMMED[type(part).__name__]:
            ahead = getattr(part, name)
            setattr(part, name, ahead - n_ahead)
            self._moved.append((part, name, ahead))

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
    """The caches of several texts, which make up a batch.

    Args:
        feed: Feeds tokens (R, n) to the model with the caches of R texts.
    """

    def __init__(self, feed: Feed) -> None:
        self.layers: list[Any] = []
        self.feed = feed
        self._texts: list[CachedText] = []

    def marks(self, texts: Sequence[CachedText]) -> list[TextMark]:
        """Marks of some texts at the tokens that their caches hold. They share their copies."""
        if not texts:
            return []
        copies = copied_layers(self.layers)
        unknown: list[int | None] = [None] * len(copies)
        return [
            TextMark(text, self, copies, unknown, index=self._texts.index(text)) for text in texts
        ]

    def extract(self, text: CachedText) -> list[Any]:
        """The caches of one text, as if it were alone."""
        index = self._texts.index(text)
        return [layer.extract(index) for layer in self.layers]

    def keep(self, texts: Sequence[CachedText]) -> None:
        """Takes all other texts out, at once: each time copies all caches."""
        kept = [self._texts.index(text) for text in texts]
        self._texts = list(texts)
        if not texts:
            self.layers = []
        for layer in self.layers:
            layer.filter(kept)

    def join(self, texts: Sequence[CachedText], layers: list[Any]) -> None:
        """Adds the texts of another batch."""
        self._texts += texts
        if not self.layers:
            self.layers = layers
            return
        for layer, other in zip(self.layers, layers, strict=True):
            layer.extend(other)

    @staticmethod
    def merged(caches: list[list[Any]]) -> list[Any]:
        """Caches of single texts as those of a batch."""
        return [layers[0].merge(layers) for layers in map(list, zip(*caches, strict=True))]
