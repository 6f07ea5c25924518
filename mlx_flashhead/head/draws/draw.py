"""The draws at several positions, each with its settings and its key.

A kind of draw is a subclass of :class:`Draw` in a file of its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, Self, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_map

from ..kernel_inputs import SHORTEST
from .bounds import Bounds

NO_MIN_P = -1e30
# The key of a position that draws no number.
NO_KEY = (0, 0)

Key = tuple[int, int]
Given = TypeVar("Given")
Results = TypeVar("Results")


@dataclass(frozen=True)
class Draw(ABC):
    """The settings of a position's draw. Filters see the logits at temperature 1.

    Attributes:
        temperature: 0 takes the best logit.
        top_p: Keeps the likeliest tokens that together have this probability.
        min_p: Keeps tokens of at least this share of the best one's probability.
        top_k: Keeps so many of the best tokens, and those that equal the last; 0 keeps all.
        kernels: Names of the kernels that choose, and say what is certain.
        by_mass: Whether the mass that is not scored makes another choice.
        whole_mass: Whether where the filters cut decides all draws, so that the mass must be whole.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0

    kernels: ClassVar[tuple[str, ...]] = ()
    by_mass: ClassVar[bool] = True
    whole_mass: ClassVar[bool] = False

    @property
    def greedy(self) -> bool:
        """Whether the best logit is taken."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether top-p, min-p or top-k leaves tokens out."""
        return self.top_p < 1 or self.min_p > 0 or self.top_k > 0

    @cached_property
    def structure(self) -> Self:
        """Settings for which the same operations are made, on other values in arrays."""
        settings = replace(self, temperature=0.0, top_p=1.0, min_p=0.0)
        if self.temperature:
            settings = replace(settings, temperature=1.0)
        if self.top_p < 1:
            settings = replace(settings, top_p=0.5)
        if self.min_p > 0:
            settings = replace(settings, min_p=0.5)
        return settings

    @staticmethod
    @abstractmethod
    def choose(
        logits: mx.array,
        draws: "Draws",
        token_ids: mx.array | None = None,
        others: mx.array | None = None,
    ) -> mx.array:
        """Draws a token at each position from the tokens given: (R,) uint32.

        Args:
            logits: (R, K) float32.
            draws: Of R positions of this kind.
            token_ids: (R, K) uint32; None: 0 … V-1.
            others: (R, 1), the log of the mass of all other tokens, which the filters count; None
                if there are none.
        """

    @staticmethod
    @abstractmethod
    def certain(bounds: Bounds, draws: "Draws") -> mx.array:
        """Returns whether the proposed tokens are drawn whatever the logits are in their bounds.

        Args:
            bounds: Of the logits of k states.
            draws: Of k positions of this kind.

        Returns:
            (k, 1) bool.
        """


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws at R positions.

    Attributes:
        settings: The settings of each.
        inputs: Settings and keys as kernels read them, n ≥ R of each, the last one repeated. First
            (n, 3) float32, with the columns 1 / temperature (0: the best logit), top_p and
            log(min_p). Then (n,) uint32, top_k; 0 keeps all. Then (n, 2) uint32, the keys.
    """

    settings: tuple[Draw, ...]
    inputs: tuple[mx.array, mx.array, mx.array]

    @classmethod
    def of(cls, positions: Sequence[tuple[Draw, Key]]) -> "Draws":
        """The draws at some positions, by the settings and the key of each."""
        settings = tuple([each for each, _ in positions])
        if all(each.greedy for each in settings):
            return _greedy(settings)
        keys = [key for _, key in positions]
        missing = SHORTEST - len(positions)
        keys += keys[-1:] * missing
        inputs = (*_settings_arrays(settings), mx.array(keys, mx.uint32))
        return cls(settings, inputs)

    @cached_property
    def all_greedy(self) -> bool:
        """Whether each position takes the best logit."""
        return all(each.greedy for each in self.settings)

    @cached_property
    def structure(self) -> tuple[Draw, ...]:
        """The :attr:`Draw.structure` of the positions."""
        return tuple([each.structure for each in self.settings])

    @property
    def have_kernels(self) -> bool:
        """Whether kernels do what the kinds of all draws do."""
        return all(each.kernels for each in self.settings)

    @property
    def inverse_temperature(self) -> mx.array:
        """1 / temperature, (R, 1) float32; 0 takes the best logit."""
        return self.inputs[0][: len(self.settings), :1]

    @property
    def top_p(self) -> mx.array:
        """The share of the mass that the likeliest tokens must reach, (R, 1) float32."""
        return self.inputs[0][: len(self.settings), 1:2]

    @property
    def log_min_p(self) -> mx.array:
        """How far a kept logit may lie below the best one, (R, 1) float32, in nats below 0."""
        return self.inputs[0][: len(self.settings), 2:]

    @property
    def top_k(self) -> mx.array:
        """The number of best tokens that are kept, (R, 1) uint32; 0 keeps all."""
        return self.inputs[1][: len(self.settings), None]

    @property
    def keys(self) -> mx.array:
        """The keys of the positions, (R, 2) uint32."""
        return self.inputs[2][: len(self.settings)]

    @cached_property
    def filters(self) -> bool:
        """Whether a filter of a draw leaves tokens out."""
        return any(each.filters for each in self.settings)

    @cached_property
    def any_top_p(self) -> bool:
        """Whether a draw has a top-p."""
        return any(each.top_p < 1 for each in self.settings)

    @cached_property
    def any_min_p(self) -> bool:
        """Whether a draw has a min-p."""
        return any(each.min_p > 0 for each in self.settings)

    @cached_property
    def most_top_k(self) -> int:
        """The largest top-k of a draw; 0 without any."""
        return max(each.top_k for each in self.settings)

    def choose(self, logits: mx.array) -> mx.array:
        """Draws from all tokens: their logits (R, V) → (R,) uint32. Lazy."""
        return self.by_kind(
            logits, lambda kind, some, logits: kind.choose(logits.astype(mx.float32), some)
        )

    def certain(self, bounds: Bounds) -> mx.array:
        """Whether proposed tokens are drawn whatever the logits are in their bounds: (k,) bool."""
        return self.by_kind(bounds, lambda kind, some, bounds: kind.certain(bounds, some)[:, 0])

    def by_kind(
        self, arrays: Given, results_of: Callable[[type[Draw], "Draws", Given], Results]
    ) -> Results:
        """Calls a function for the positions of each kind, with filters or without.

        Args:
            arrays: An array (R, …), or a tuple of such, which may hold tuples, and other things.
            results_of: It gets the kind, the draws of its positions, and the arrays of these. Its
                results are an array of these positions, or a tuple.

        Returns:
            The same of all positions.
        """
        alike: dict[tuple[type[Draw], bool], list[int]] = {}
        for position, settings in enumerate(self.settings):
            alike.setdefault((type(settings), settings.filters), []).append(position)
        if len(alike) == 1:
            return results_of(type(self.settings[0]), self, arrays)
        results = []
        order: list[int] = []
        for (kind, _), positions in alike.items():
            taken = tree_map(partial(_taken, positions=mx.array(positions, mx.uint32)), arrays)
            results.append(results_of(kind, self._at(positions), taken))
            order += positions
        back = mx.array([order.index(position) for position in range(len(order))], mx.uint32)

        def in_order(*parts: mx.array) -> mx.array:
            return mx.take(mx.concatenate(list(parts)), back, axis=0)

        return cast(Results, tree_map(in_order, *results))

    def _at(self, positions: list[int]) -> "Draws":
        """The draws at some of the positions."""
        settings = tuple(self.settings[position] for position in positions)
        missing = SHORTEST - len(positions)
        filled = mx.array(positions + positions[-1:] * missing, mx.uint32)
        return Draws(settings, tree_map(partial(_taken, positions=filled), self.inputs))


def _taken(array: Any, positions: mx.array) -> Any:
    """Some positions of an array, and anything else as it is."""
    if not isinstance(array, mx.array):
        return array
    return mx.take(array, positions, axis=0)


@lru_cache(maxsize=256)
def _greedy(settings: tuple[Draw, ...]) -> Draws:
    """The draws at greedy positions. They exist before the next token, so that none makes them."""
    n_keys = max(len(settings), SHORTEST)
    keys = mx.array([NO_KEY] * n_keys, mx.uint32)
    return Draws(settings, (*_settings_arrays(settings), keys))


@lru_cache(maxsize=256)
def _settings_arrays(settings: tuple[Draw, ...]) -> tuple[mx.array, mx.array]:
    """Returns the first two arrays of :class:`Draws`. They stay the same for a text."""
    floats = []
    counts = []
    missing = SHORTEST - len(settings)
    for each in [*settings, *settings[-1:] * missing]:
        inverse = 0.0
        if each.temperature:
            inverse = 1 / each.temperature
        log_min_p = NO_MIN_P
        if each.min_p:
            log_min_p = math.log(each.min_p)
        floats.append([inverse, each.top_p, log_min_p])
        counts.append(each.top_k)
    return mx.array(floats, mx.float32), mx.array(counts, mx.uint32)
