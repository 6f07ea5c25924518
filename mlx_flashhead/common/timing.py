"""How times are measured: in turns, warm, over many rounds.

The compared functions run in turns, once each in a round, so that a machine that heats up or shares
its cores slows all of them alike. Each round has another order, since a run leaves its pages and
caches behind. The first round warms up and is not counted. Results are medians and quartiles.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np

Item = TypeVar("Item")


def spread(values: Sequence[float], factor: float = 1) -> dict:
    """Median and quartiles of some runs, and their number, JSON-ready.

    In other units by ``factor``, such as 1000 for milliseconds of seconds.
    """
    lower, median, upper = (factor * float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"median": median, "lower": lower, "upper": upper, "runs": len(values)}


def in_turns(
    timers: Mapping[Item, Callable[[int], float]], rounds: int
) -> Iterator[dict[Item, list[float]]]:
    """Measures in turns: a round 0 to warm up, then ``rounds`` that count.

    ``timers`` are functions of the round's number that return seconds. Yields after each round the
    seconds of the counted rounds so far, by name.
    """
    seconds: dict[Item, list[float]] = {name: [] for name in timers}
    draw = random.Random(0)
    for number in range(rounds + 1):
        order = draw.sample(list(timers), len(timers))
        of_round = {name: timers[name](number) for name in order}
        if number:
            for name, taken in of_round.items():
                seconds[name].append(taken)
        yield seconds


def timer(
    run: Callable[[int], object], before: Callable[[], None] | None = None
) -> Callable[[int], float]:
    """A function of the round's number that measures another one, ``before`` outside the time.

    Arrays in the result of ``run`` are evaluated within the time.
    """

    def seconds(number: int) -> float:
        if before is not None:
            before()
        start = time.perf_counter()
        mx.eval(run(number))
        return time.perf_counter() - start

    return seconds
