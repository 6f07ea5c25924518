"""Whether a wide step has the bits of single steps, tried once before one is used.

T single steps are compared with one of T tokens, from the same caches: all bits of the hidden
states (of the logits, without a FlashHead) and of the caches, and of the step after. Every width is
tried and timed at one length, and one width at each other length where MLX's kernels or mlx-lm's
caches change.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..common.machine import is_busy
from ..common.stored import store, stored
from ..head.backend import gpu_is_default
from ..head.flash_head import FlashHead
from ..models.compat.cache_positions import OF_A_BATCH, WINDOWS, set_end
from ..models.compat.mlx_lm import (
    ArraysCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from ..models.install import get_flash_head
from . import store as trial_store
from .parts import ModelParts
from .stand_ins import has_stand_in, is_past_end, n_held, parts_of, there_is_memory
from .step import MAX_WIDTH, NOTHING, WIDTHS, Established, WideStep, WideSteps, layout_of
from .twin import NoWideStepError

# Tokens of the prompt.
SHORT = 5
# Tokens before a length at which MLX's attention changes kernels.
LONG = (1022, 4094)
# Tokens of a step at other lengths than the first, at most.
OTHER_WIDTH = 4
# The shortest time of so many counts.
ROUNDS = 2
# So many single steps are timed one behind the other.
SINGLE_STEPS = 6
# The share of a model's bytes that may lie in layers that a GPU reads once a token.
MOST_UNQUANTIZED = 1 / 8
UINTS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
ANNOUNCEMENT = "Steps of several tokens are compared with single ones and timed, with %s."
log = logging.getLogger("mlx_flashhead")


def established_costs(steps: WideSteps, caches: list[Any]) -> dict[int, float]:
    """The times of the steps of several tokens that leave the bits of single steps.

    They are tried when caches of a layout are seen for the first time, on this machine. That takes
    some seconds and evaluates, so it is for the time before a text's first token. Within a text
    :meth:`WideSteps.costs` says what is known. A message of the log, of the level INFO, announces
    each trial.

    Args:
        steps: The wide steps of a model.
        caches: Those of a text.

    Returns:
        The time of a step from these caches on, relative to a single one, by its number of tokens.
    """
    layout = layout_of(caches)
    if layout not in steps.established:
        steps.established[layout] = _established(steps, caches, layout)
    return steps.costs(caches)


def _established(steps: WideSteps, caches: list[Any], layout: str) -> Established:
    if not all(map(has_stand_in, parts_of(caches))) or not _is_worth_it(steps.model):
        return NOTHING
    if steps.model_changes_itself is None:
        steps.model_changes_itself = _changes_itself(steps, caches)
    if steps.model_changes_itself:
        log.info("Steps of several tokens are off: this model's own steps change it.")
        return NOTHING
    path = trial_store.path_of(steps.model)
    key = trial_store.key_of(layout)
    known: dict[str, Established] = {}
    if path is not None:
        known = stored(path, Established)
    if key in known and (is_busy() or not known[key].busy):
        return known[key]
    log.info(ANNOUNCEMENT, layout)
    # A device may raise anything.
    try:
        found = _tried(steps, caches)
    except Exception as error:
        log.info("Steps of several tokens are off: %s", str(error).split("\n")[0])
        return NOTHING
    finally:
        # The caches were long.
        mx.clear_cache()
    if path is not None and found.lengths:
        store(path, known | {key: found})
    return found


def _tried(steps: WideSteps, caches: list[Any]) -> Established:
    found = NOTHING
    busy = is_busy()
    for apart in (False, True):
        trial = _Trial(steps, caches, apart)
        try:
            found = trial.established()
        except NoWideStepError as error:
            log.info("Steps of several tokens are off: %s", error)
            found = Established({}, apart, lengths=tuple(trial.lengths))
        if found.costs:
            break
    return found._replace(busy=busy or is_busy())


def _changes_itself(steps: WideSteps, caches: list[Any]) -> bool:
    """Whether a step changes the model by more than arrays that it replaces by equal ones.

    A first step may keep what later ones use.
    """
    model: Any = steps.model
    token = mx.array([[0]])
    for _ in range(2):
        steps.parts = ModelParts(model)
        with _intercepted(get_flash_head(model), lambda hidden: hidden):
            mx.eval(model(token, cache=[_fresh(cache) for cache in caches]))
    return not steps.parts.note_renewed(model)


def _intercepted(
    head: FlashHead | None, note: Callable[[mx.array], mx.array]
) -> AbstractContextManager[None]:
    """A block in which ``note`` gets the states of a FlashHead's calls, if there is one."""
    if head is None:
        return nullcontext()
    return head.intercepted(note)


def _is_worth_it(model: nn.Module) -> bool:
    """Whether a GPU would read most weights once for all tokens of a step: the quantized ones."""
    if not gpu_is_default():
        return True
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    unquantized: int = sum(layer.weight.nbytes for layer in layers)
    total: int = sum(array.nbytes for array in _arrays(model.parameters()))
    return unquantized <= MOST_UNQUANTIZED * total


class _Trial:
    """A trial of a twin of a model.

    Attributes:
        lengths: Of the texts after which something was tried.
    """

    def __init__(self, steps: WideSteps, caches: list[Any], apart: bool):
        self._model: Any = steps.model
        self._twin: Any = steps.twin(apart=apart)
        self._steps = steps
        self._head = get_flash_head(steps.model)
        self._apart = apart
        self.lengths: list[int] = []
        self._fresh = [_fresh(cache) for cache in caches]
        self._tokens = mx.random.randint(0, 32, (1, SHORT + MAX_WIDTH + 1), key=mx.random.key(0))

    def established(self) -> Established:
        """What holds, with the times relative to a single step.

        Every width is tried at the first length for which there is memory. At others one is tried,
        and nothing holds where that one does not. Steps are timed where no window is past its end,
        and where one is.
        """
        caches = copy.deepcopy(self._fresh)
        self._run(self._model, self._tokens[:, :SHORT], caches)
        holding: list[int] = []
        # The times by whether a window is past its end.
        costs: dict[bool, dict[int, float]] = {}
        for length in _lengths(self._fresh):
            longer = [_lengthened(cache, length) for cache in caches]
            if not there_is_memory(4 * sum(cache.nbytes for cache in longer)):
                continue
            self.lengths.append(length)
            found = self._holding(longer, holding)
            if not found:
                log.info("Steps of several tokens are off: they differ at length %d", length)
                return Established({}, self._apart, lengths=tuple(self.lengths))
            if not holding:
                holding = found
            past_end = _are_past_end(longer)
            if past_end is not None and past_end not in costs:
                costs[past_end] = self._costs(longer, holding)
        return Established(
            costs=costs.get(False, costs.get(True, {})),
            apart=self._apart,
            costs_past_end=costs.get(True),
            lengths=tuple(self.lengths),
        )

    def _holding(self, caches: list[Any], known: list[int]) -> list[int]:
        """The widths that hold after these caches.

        Args:
            caches: Of some length.
            known: Those that hold at another length, of which one is tried; empty: all are.
        """
        widths: Sequence[int] = WIDTHS
        if known:
            narrow = [width for width in known if width <= OTHER_WIDTH]
            widths = [max(narrow, default=MAX_WIDTH)]
        return [width for width in widths if self._holds(caches, width)]

    def _holds(self, caches: list[Any], width: int) -> bool:
        """Whether a step after these caches leaves the bits of single steps, going back too."""
        single = copy.deepcopy(caches)
        wide = copy.deepcopy(caches)
        expected: list[mx.array] = []
        # The states without values of each position, as each single step leaves them.
        left: list[list[mx.array]] = []
        for i in range(width):
            expected.append(self._run(self._model, self._next(i, i + 1), single))
            left.append(_contents(_states(single)))
        found, step = self._feed(self._twin, self._next(0, width), wide)
        mx.eval(found, [cache.state for cache in wide])
        alike = [have_same_bits(found, mx.concatenate(expected, axis=1))]
        alike += map(have_same_bits, _contents(wide), _contents(single))
        mx.eval(alike)
        following = self._next(width, width + 1)
        after_wide = self._run(self._model, following, copy.deepcopy(wide))
        after_single = self._run(self._model, following, copy.deepcopy(single))
        alike.append(have_same_bits(after_wide, after_single))
        # States are made anew.
        if _states(wide):
            for n in range(width - 1, 0, -1):
                cast(WideStep, step).back_to(n)
                alike += map(have_same_bits, _contents(_states(wide)), left[n - 1])
        holds = bool(mx.stack(alike).all())
        if not holds:
            log.info("A step of %d tokens is off: it differs from single steps", width)
        return holds

    def _costs(self, caches: list[Any], widths: list[int]) -> dict[int, float]:
        """The times of steps after these caches, which are compiled, relative to a single one.

        The choices of the head are in them, without what verifies them later. Single steps are
        launched before the one before them is read, as a text's are. What follows a wide step waits
        for its tokens, so that the host's time counts there.
        """
        times = [self._single_seconds(copy.deepcopy(caches)) for _ in range(ROUNDS)]
        single = min(times)
        costs = {}
        for width in widths:
            times = [self._wide_seconds(copy.deepcopy(caches), width) for _ in range(ROUNDS)]
            costs[width] = min(times) / single
        return costs

    def _single_seconds(self, caches: list[Any]) -> float:
        latest = self._next(0, 1)
        began = time.perf_counter()
        for _ in range(SINGLE_STEPS):
            states, _ = self._feed(self._model, latest, caches)
            latest = self._choices(states)
            mx.async_eval(latest)
        mx.eval(latest, [cache.state for cache in caches])
        return (time.perf_counter() - began) / SINGLE_STEPS

    def _wide_seconds(self, caches: list[Any], width: int) -> float:
        began = time.perf_counter()
        states, _ = self._feed(self._twin, self._next(0, width), caches)
        mx.eval(self._choices(states), [cache.state for cache in caches])
        return time.perf_counter() - began

    def _choices(self, states: mx.array) -> mx.array:
        """What the head chooses after each position: (1, T, D), or logits (1, T, V) → (1, T)."""
        if self._head is None:
            return mx.argmax(states, axis=-1)
        return self._head.propose(states[0]).tokens[None]

    def _next(self, start: int, stop: int) -> mx.array:
        return self._tokens[:, SHORT + start : SHORT + stop]

    def _run(self, model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
        """What :meth:`_feed` gives first. Evaluates."""
        states, _ = self._feed(model, tokens, caches)
        mx.eval(states, [cache.state for cache in caches])
        return states

    def _feed(
        self, model: Any, tokens: mx.array, caches: list[Any]
    ) -> tuple[mx.array, WideStep | None]:
        """Feeds tokens (1, T) to the model or its twin.

        Returns:
            What makes the choices after each: states (1, T, D), or logits (1, T, V); and the step
            of a twin.
        """
        states: list[mx.array] = []

        def note(hidden: mx.array) -> mx.array:
            """Notes the states, and returns them in the place of logits, which nobody wants."""
            states.append(hidden)
            return hidden

        step = None
        with _intercepted(self._head, note):
            if model is self._twin:
                step = self._steps.feed_by(model, tokens, caches)
                logits = step.logits
            else:
                logits = model(tokens, cache=caches)
        if states:
            return states[-1], step
        return logits, step


def _are_past_end(caches: list[Any]) -> bool | None:
    """Whether a window of some caches is past its end; None where that depends on the width."""
    parts = list(parts_of(caches))
    if any(is_past_end(cache, 1) for cache in parts):
        return True
    if any(is_past_end(cache, MAX_WIDTH) for cache in parts):
        return None
    return False


def _lengths(caches: list[Any]) -> list[int]:
    """Lengths at which something changes: a window ends, or MLX takes other kernels.

    A usual one comes first.
    """
    windows = {cache.max_size for cache in parts_of(caches) if type(cache) in WINDOWS}
    ends = sorted(window - 2 for window in windows if window > SHORT + 2)
    beyond = [window + SHORT for window in windows if window >= max(LONG)]
    lengths = [LONG[0], SHORT, *LONG, *beyond, *ends]
    return list(dict.fromkeys(lengths))


def _fresh(cache: Any) -> Any:
    """An empty cache like another."""
    if type(cache) is CacheList:
        return CacheList(*map(_fresh, cache.caches))
    arguments = {
        QuantizedKVCache: ("group_size", "bits"),
        RotatingKVCache: ("max_size", "keep"),
        BatchRotatingKVCache: ("max_size",),
        ChunkedKVCache: ("chunk_size",),
    }
    if type(cache) is ArraysCache:
        padding = None
        if cache.left_padding is not None:
            padding = [0]
        return ArraysCache(len(cache.cache), padding)
    named = {name: getattr(cache, name) for name in arguments.get(type(cache), ())}
    if type(cache) in OF_A_BATCH:
        named["left_padding"] = [0]
    return type(cache)(**named)


def _lengthened(cache: Any, length: int) -> Any:
    """A copy of a cache that holds its tokens again and again, ``length`` of them."""
    longer = copy.deepcopy(cache)
    if type(cache) is CacheList:
        longer.caches = tuple(_lengthened(part, length) for part in cache.caches)
    elif type(cache) is not ArraysCache and cache.keys is not None:
        if type(cache) is ChunkedKVCache:
            length = min(length, cache.chunk_size - MAX_WIDTH)
        n_slots = length
        if type(cache) in WINDOWS:
            n_slots = min(length, cache.max_size)
        repeated = mx.arange(n_slots) % SHORT
        longer.keys, longer.values = tree_map(
            lambda array: mx.take(array, repeated, axis=-2), (cache.keys, cache.values)
        )
        set_end(longer, length, n_slots)
    return longer


def _contents(caches: list[Any]) -> list[mx.array]:
    """All that caches hold for the text so far."""
    contents: list[mx.array] = []
    for cache in parts_of(caches):
        if type(cache) is ArraysCache:
            contents += map(mx.array, _arrays([cache.cache, cache.left_padding]))
            continue
        n = n_held(cache)
        for name, value in vars(cache).items():
            if name in ("keys", "values"):
                contents += [array[..., :n, :] for array in _arrays([value])]
            elif value is not None:
                # It is a position or a setting.
                contents.append(mx.array(value).reshape(-1))
    return contents


def _states(caches: list[Any]) -> list[Any]:
    """The caches that have no values of each position."""
    return [cache for cache in parts_of(caches) if type(cache) is ArraysCache]


def _arrays(tree: Any) -> list[mx.array]:
    """The arrays in lists and dictionaries."""
    leaves: Any = tree_flatten(tree)
    return [array for _, array in leaves if array is not None]


def have_same_bits(one: mx.array, other: mx.array) -> mx.array:
    """Whether two arrays have the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return mx.array(False)
    bits = UINTS[one.dtype.size]
    return mx.array_equal(one.view(bits), other.view(bits))
