"""Whether a wide step has the bits of single steps, tried once before one is used.

T single steps are compared with one of T tokens, from the same caches: all bits of the hidden
states (of the logits, without a FlashHead) and of the caches, and of the step after. Every width is
tried after a short prompt, and one at each length where MLX's kernels or mlx-lm's caches change.
"""

import copy
import logging
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..head.backend import gpu_is_default
from ..models.compat.mlx_lm import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from ..models.install import get_flash_head
from .wide import MAX_WIDTH, Established, WideSteps, kind_of
from .wide_caches import is_known

SHORT = 5  # tokens of the prompt after which every width is tried
LONG = (1022, 4094)  # tokens before a length at which MLX's attention changes kernels
LONG_WIDTH = 4  # tokens of a step at other lengths, at most
MOST_UNQUANTIZED = 1 / 8  # of a model's bytes, in layers that a GPU reads once a token
UINTS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
log = logging.getLogger("mlx_flashhead")


def established_widths(steps: WideSteps, caches: list[Any]) -> list[int]:
    """The numbers of tokens of a step that leave the bits of single steps, of 2 to 8.

    They are tried when caches of a kind are seen for the first time. Evaluates then.
    """
    kind = kind_of(caches)
    if kind not in steps.established:
        steps.established[kind] = _tried(steps, caches)
    return steps.widths(caches)


def _tried(steps: WideSteps, caches: list[Any]) -> Established:
    if not all(map(is_known, caches)) or not _is_worth_it(steps.model):
        return Established([])
    widths: list[int] = []
    for apart in (False, True):
        try:
            widths = _Trial(steps, caches, apart).widths()
        except Exception as error:  # a model may do anything
            log.info("Steps of several tokens are off: %s", str(error).split("\n")[0])
        mx.clear_cache()  # of long caches
        if widths:
            return Established(widths, apart)
    return Established([])


def _is_worth_it(model: nn.Module) -> bool:
    """Whether a GPU would read most weights once for all tokens of a step: the quantized ones."""
    if not gpu_is_default():
        return True
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    unquantized: int = sum(layer.weight.nbytes for layer in layers)
    total: int = sum(array.nbytes for array in _arrays(model.parameters()))
    return unquantized <= MOST_UNQUANTIZED * total


class _Trial:
    """A trial of a twin of a model."""

    def __init__(self, steps: WideSteps, caches: list[Any], apart: bool):
        self._model: Any = steps.model
        self._twin: Any = steps.twin(apart=apart)
        self._steps = steps
        self._head = get_flash_head(steps.model)
        self._fresh = [_fresh(cache) for cache in caches]
        self._tokens = mx.random.randint(0, 100, (1, SHORT + MAX_WIDTH + 1), key=mx.random.key(0))

    def widths(self) -> list[int]:
        """The widths that hold at every length."""
        caches = copy.deepcopy(self._fresh)
        self._states(self._model, self._tokens[:, :SHORT], caches)
        mx.eval([cache.state for cache in caches])
        holding = self._holding(caches, list(range(2, MAX_WIDTH + 1)))
        if not holding:
            return []
        width = max((width for width in holding if width <= LONG_WIDTH), default=holding[0])
        for length in _lengths(self._fresh):
            longer = [_lengthened(cache, length) for cache in caches]
            if _fit(longer) and not self._holding(longer, [width]):
                log.info("Steps of several tokens are off: they differ at length %d", length)
                return []
        return holding

    def _holding(self, caches: list[Any], widths: list[int]) -> list[int]:
        """Those of some widths that leave the bits of single steps after these caches."""
        single = copy.deepcopy(caches)
        states: list[mx.array] = []
        left: dict[int, list[mx.array]] = {}
        for i in range(max(widths) + 1):
            states.append(self._states(self._model, self._next(i, i + 1), single))
            mx.eval(states[-1], [cache.state for cache in single])
            if i + 1 in widths:
                left[i + 1] = _contents(single)
                mx.eval(left[i + 1])
        holding = []
        for width in widths:
            wide = copy.deepcopy(caches)
            found = [self._states(self._twin, self._next(0, width), wide)]
            contents = _contents(wide)
            if width == max(widths):
                found.append(self._states(self._model, self._next(width, width + 1), wide))
            expected = mx.concatenate(states[: width + len(found) - 1], axis=1)
            alike = [_alike(mx.concatenate(found, axis=1), expected)]
            alike += [_alike(*pair) for pair in zip(contents, left[width], strict=True)]
            if mx.stack(alike).all():
                holding.append(width)
            else:
                log.info("A step of %d tokens is off: it differs from single steps", width)
        return holding

    def _next(self, start: int, stop: int) -> mx.array:
        return self._tokens[:, SHORT + start : SHORT + stop]

    def _states(self, model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
        """What makes the choices after tokens (1, T): states (1, T, D), or logits (1, T, V)."""
        if self._head is None:
            return self._fed(model, tokens, caches)
        head = self._head
        states: list[mx.array] = []

        def note(hidden: mx.array) -> mx.array:
            states.append(hidden)
            return mx.zeros((*hidden.shape[:-1], head.vocab_size), hidden.dtype)

        with head.intercepted(note):
            self._fed(model, tokens, caches)
        return states[-1]

    def _fed(self, model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
        if model is self._twin:
            return self._steps.feed_by(model, tokens, caches).logits
        return cast(mx.array, model(tokens, cache=caches))


def _lengths(caches: list[Any]) -> list[int]:
    """Lengths at which something changes: a window ends, or MLX takes other kernels."""
    windows = {cache.max_size for cache in _parts(caches) if type(cache) is RotatingKVCache}
    ends = {window - 2 for window in windows if window > SHORT + 2}
    lengths = sorted({*LONG, *ends})
    beyond = [window + SHORT for window in windows if window >= lengths[-1]]
    return [*lengths, *beyond]


def _parts(caches: list[Any]) -> list[Any]:
    parts: list[Any] = []
    for cache in caches:
        parts += _parts(list(cache.caches)) if type(cache) is CacheList else [cache]
    return parts


def _fresh(cache: Any) -> Any:
    """An empty cache like another."""
    if type(cache) is CacheList:
        return CacheList(*map(_fresh, cache.caches))
    arguments = {
        QuantizedKVCache: ("group_size", "bits"),
        RotatingKVCache: ("max_size", "keep"),
        ChunkedKVCache: ("chunk_size",),
    }
    if type(cache) is ArraysCache:
        return ArraysCache(len(cache.cache))
    return type(cache)(**{name: getattr(cache, name) for name in arguments.get(type(cache), ())})


def _lengthened(cache: Any, length: int) -> Any:
    """A copy of a cache that holds its tokens again and again, ``length`` of them."""
    longer = copy.deepcopy(cache)
    if type(cache) is CacheList:
        longer.caches = tuple(_lengthened(part, length) for part in cache.caches)
    elif type(cache) is not ArraysCache and cache.keys is not None:
        n_slots = length if type(cache) is not RotatingKVCache else min(length, cache.max_size)
        if type(cache) is ChunkedKVCache:
            length = n_slots = min(length, cache.chunk_size - MAX_WIDTH)
        repeated = mx.arange(n_slots) % cache.offset
        longer.keys, longer.values = tree_map(
            lambda array: mx.take(array, repeated, axis=-2), (cache.keys, cache.values)
        )
        longer.offset = length
        if type(cache) is RotatingKVCache:
            longer._idx = n_slots
    return longer


def _fit(caches: list[Any]) -> bool:
    """Whether there is memory for a few copies of caches."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    needed = 4 * sum(cache.nbytes for cache in caches)
    return limit is None or mx.get_active_memory() + needed < limit


def _contents(caches: list[Any]) -> list[mx.array]:
    """All that caches hold for the text so far."""
    contents: list[mx.array] = []
    for cache in _parts(caches):
        if type(cache) is ArraysCache:
            contents += [array[...] for array in _arrays(cache.cache)]
        else:
            n = cache.offset - getattr(cache, "start_position", 0)
            arrays = _arrays([cache.keys, cache.values])
            contents += [*(array[..., :n, :] for array in arrays), mx.array([cache.offset])]
    return contents


def _arrays(tree: Any) -> list[mx.array]:
    """The arrays in lists and dictionaries."""
    leaves: Any = tree_flatten(tree)
    return [array for _, array in leaves if array is not None]


def _alike(one: mx.array, other: mx.array) -> mx.array:
    """Whether two arrays have the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return mx.array(False)
    kind = UINTS[one.dtype.size]
    return mx.array_equal(one.view(kind), other.view(kind))
