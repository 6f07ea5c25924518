"""How times are measured: in turns, warm, over many runs.

The compared functions run in turns, once each in a round, so that a machine that heats up or shares
its cores slows all of them alike. Each round has another order, since a run leaves its pages and
caches behind. The first round warms up and is not counted. Results are medians and quartiles.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from tqdm import tqdm

HEAD_ROUNDS = 5
CACHES_BYTES = 128 << 20  # more than the last cache of most machines
Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a number of runs, and their number."""

    median: float
    lower: float
    upper: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        lower, median, upper = (float(x) for x in np.percentile(values, (25, 50, 75)))
        return cls(median, lower, upper, len(values))

    def scaled(self, factor: float) -> "Spread":
        """The same in other units, such as milliseconds for seconds."""
        return Spread(self.median * factor, self.lower * factor, self.upper * factor, self.runs)

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


class ColdCaches:
    """A call rewrites 128 MB, so that the next function reads its weights from memory.

    In a model the body does that between two calls of the head. Here too MLX does it: on the GPU,
    or in the thread that runs the head next and is then awake.
    """

    def __init__(self):
        self._memory = mx.zeros(CACHES_BYTES // 4)

    def __call__(self) -> None:
        self._memory = self._memory + 1
        mx.eval(self._memory)


def turns(items: Iterable[Item], rounds: int) -> Iterator[tuple[int, Item]]:
    """Yields the number of the round, 0 … rounds, and each item, in a new order each round.

    The orders are the same for the same number of items.
    """
    items, draw = list(items), random.Random(0)
    for number in range(rounds + 1):
        for item in draw.sample(items, len(items)):
            yield number, item


def on_batch(form: Callable[[mx.array], Any], batches: Sequence[mx.array], number: int) -> Any:
    """The result of a function for the batch of that number."""
    return form(batches[number])


def in_turns(
    runs: Mapping[Item, Callable[[int], object]],
    rounds: int,
    *,
    before: Callable[[], None] | None = None,
    progress: bool = True,
    description: str = "Timing",
) -> dict[Item, list[float]]:
    """Times functions in turns: one round to warm up, then ``rounds`` that count.

    Args:
        runs: By name, functions of the round's number, 0 … rounds. Arrays in their results are
            evaluated within the time.
        rounds: Rounds that count.
        before: Called before each run, outside its time.
        progress: Show a bar.
        description: Of the bar.

    Returns:
        By name, the seconds of each counted round.
    """
    seconds: dict[Item, list[float]] = {name: [] for name in runs}
    bar = tqdm(
        total=(rounds + 1) * len(runs), desc=description, unit="run", leave=False,
        disable=not progress,
    )  # fmt: skip
    with bar:
        for number, name in turns(runs, rounds):
            if before is not None:
                before()
            start = time.perf_counter()
            mx.eval(runs[name](number))
            taken = time.perf_counter() - start
            if number:
                seconds[name].append(taken)
            bar.update()
    return seconds


def head_seconds(heads: tuple[Callable, ...], states: mx.array) -> tuple[list[float], ...]:
    """Times heads, from one hidden state to full logits.

    Args:
        heads: Hidden states (1, 1, D) → logits (1, 1, V).
        states: (L, D).

    Returns:
        For each head the seconds of each state, repeated several times. The heads take turns.
    """
    runs = {
        str(number): lambda i, head=head: head(states[None, i % len(states), None])
        for number, head in enumerate(heads)
    }
    return tuple(in_turns(runs, HEAD_ROUNDS * len(states), progress=False).values())
