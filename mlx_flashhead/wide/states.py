"""States without values of each position, such as a linear attention's, after any position.

A step keeps the calls that write such a state: their arguments, and what the parts with weights
gave within them. The state after the first ``n`` positions is what the same calls write if they get
the first ``n`` positions of these. So a layer's own code makes it, and reads no weight again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import mlx.core as mx

from ..models.compat.mlx_lm import ArraysCache
from .positions import Positions

Args = tuple[Any, ...]
Named = dict[str, Any]


class _Run(Protocol):
    """What a step, or a call that is made again, does at each call of a layer and of its parts."""

    def layer(self, function: Callable[..., Any], args: Args, named: Named) -> Any:
        """Calls a layer that got caches."""
        ...

    def part(self, part: object, function: Callable[[mx.array], Any], x: mx.array) -> Any:
        """Calls a part with weights."""
        ...

    def arrays(self, key: str, arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """The arrays (1, T, …) that a function makes a state of."""
        ...


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


def call_layer(function: Callable[..., Any], args: Args, named: Named) -> Any:
    """Calls a layer of a twin, which may write a state."""
    run = _run.get()
    if run is None:
        return function(*args, **named)
    return run.layer(function, args, named)


def call_part(part: object, function: Callable[[mx.array], Any], x: mx.array) -> Any:
    """Calls a part of a twin that has weights with an array."""
    run = _run.get()
    if run is None:
        return function(x)
    return run.part(part, function, x)


def made_of(key: str, *arrays: mx.array) -> tuple[mx.array, ...]:
    """The arrays (1, T, …) of which a function makes a state, for code that multiplies itself."""
    run = _run.get()
    if run is None:
        return arrays
    return run.arrays(key, arrays)


class StateStandIn:
    """Stands in for a state without values of each position. The model gets the cache itself.

    Args:
        cache: The cache with the state.
        n_positions: Of the step.
    """

    def __init__(self, cache: ArraysCache, n_positions: int):
        self.given = cache
        self._n_positions = n_positions
        self._before = as_now(vars(cache))
        self._seen = list(cache.cache)
        self._calls: list[_Call] = []

    def keep_if_it_writes(self, call: "_Call") -> None:
        """Keeps a call that has ended if it has written the state, and no call within it has."""
        if self.is_written:
            self._calls.append(call)
            self._seen = list(self.given.cache)

    @property
    def is_written(self) -> bool:
        """Whether the state was written since the latest call that is known to have done so."""
        pairs = zip(self.given.cache, self._seen, strict=True)
        return any(one is not other for one, other in pairs)

    def back_to(self, n: int) -> None:
        """Brings the state back to the first ``n`` positions of this step."""
        vars(self.given).update(as_now(self._before))
        if n:
            for call in self._calls:
                call.again(n, self._n_positions)

    def as_before(self) -> "StateStandIn":
        """For a layer that is called again; the state is as before the step then."""
        return self


def as_now(attributes: dict[str, Any]) -> dict[str, Any]:
    """A cache's attributes, with a list and arrays that no update changes in place."""
    return {name: _kept(value) for name, value in attributes.items()}


def _kept(value: Any) -> Any:
    """A value that stays as it is when code changes an array or a list in place."""
    if isinstance(value, mx.array):
        return mx.array(value)
    if type(value) is list:
        return list(value)
    return value


class _Call:
    """A call of a layer, and what its parts with weights gave.

    Attributes:
        results: What each part gave, by its id, with the shape of what it got.
        arrays: The arrays of which functions make states, by the functions' keys.
    """

    def __init__(self, function: Callable[..., Any], args: Args, named: Named):
        self._function = function
        self._args = tuple(map(_kept, args))
        self._named = {name: _kept(value) for name, value in named.items()}
        self.results: dict[int, list[tuple[Any, mx.array]]] = {}
        self.arrays: dict[str, list[tuple[mx.array, ...]]] = {}

    def again(self, n: int, n_positions: int) -> None:
        """Makes the call with the first ``n`` of its positions, for what it writes."""
        args = [first_positions(value, n, n_positions) for value in self._args]
        named = {}
        for name, value in self._named.items():
            named[name] = first_positions(value, n, n_positions)
        with run_as(_Again(self, n)):
            self._function(*args, **named)


class Step:
    """A step that is taken.

    Args:
        stand_ins: Those for its states.
    """

    def __init__(self, stand_ins: Iterable[StateStandIn]):
        self._states = {id(each.given): each for each in stand_ins}
        # Calls that have begun and not ended.
        self._calls: list[_Call] = []

    def layer(self, function: Callable[..., Any], args: Args, named: Named) -> Any:
        """Calls a layer, and keeps the call if it writes a state."""
        given = [*args, *named.values()]
        states = [self._states[id(each)] for each in _states_in(given) if id(each) in self._states]
        if not states:
            return function(*args, **named)
        call = _Call(function, args, named)
        self._calls.append(call)
        result = function(*args, **named)
        self._calls.pop()
        for state in states:
            state.keep_if_it_writes(call)
        return result

    def part(self, part: object, function: Callable[[mx.array], Any], x: mx.array) -> Any:
        """Calls a part, and keeps its result."""
        result = function(x)
        if isinstance(result, mx.array):
            for call in self._calls:
                call.results.setdefault(id(part), []).append((x.shape, result))
        return result

    def arrays(self, key: str, arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """Keeps the arrays."""
        for call in self._calls:
            call.arrays.setdefault(key, []).append(arrays)
        return arrays

    @property
    def explains_states(self) -> bool:
        """Whether all that was written into states was written by calls that are known."""
        return not any(state.is_written for state in self._states.values())


class _Again:
    """A call that is made again, with the first ``n`` of its positions."""

    def __init__(self, call: _Call, n: int):
        self._n = n
        self._results = {part: iter(results) for part, results in call.results.items()}
        self._arrays = {key: iter(arrays) for key, arrays in call.arrays.items()}

    def layer(self, function: Callable[..., Any], args: Args, named: Named) -> Any:
        """Calls a layer within the call."""
        return function(*args, **named)

    def part(self, part: object, function: Callable[[mx.array], Any], x: mx.array) -> Any:
        """What the part gave for these positions in the step."""
        found = next(self._results.get(id(part), iter(())), None)
        if found is None:
            return function(x)
        shape, result = found
        for axis, (whole, now) in enumerate(zip(shape, x.shape, strict=True)):
            if whole != now:
                # A convolution's array has some positions before the first, too.
                n_kept = result.shape[axis] - (whole - now)
                return mx.split(result, [n_kept], axis=axis)[0]
        return result

    def arrays(self, key: str, arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """The first positions of the step's arrays."""
        found = next(self._arrays.get(key, iter(())), arrays)
        return tuple(array[:, : self._n] for array in found)


@contextmanager
def run_as(run: _Run | None) -> Iterator[None]:
    """Calls of a twin's layers and parts are ``run``'s in this context; None: they are plain."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def _states_in(given: Iterable[Any]) -> Iterator[ArraysCache]:
    """The states among the arguments of a layer, those in a layer's list of caches too."""
    for value in given:
        if type(value) is ArraysCache:
            yield value
        elif hasattr(value, "caches"):
            yield from _states_in(value.caches)


def first_positions(value: Any, n: int, n_positions: int) -> Any:
    """An argument of a layer for the first ``n`` of a step's positions."""
    if isinstance(value, mx.array):
        if value.ndim > 1 and value.shape[1] == n_positions:
            return value[:, :n]
        return value
    if isinstance(value, Positions):
        if n > 1:
            return Positions(value.parts[:n])
        return value.parts[0]
    if hasattr(value, "as_before"):
        return value.as_before()
    return value
