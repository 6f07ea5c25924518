"""Work in short steps, which a caller can advance between other work, or drop.

A function in steps is a generator: it yields a `Step` after each part of its work and returns its
result. `stepwise` lets it be called like any other function too, which takes all steps at once.
"""

import functools
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from tqdm import tqdm

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Step:
    """How far a stage of the work is: ``done`` of ``total`` units."""

    stage: str
    done: int
    total: int
    unit: str


Steps = Generator[Step, None, Result]


def take_all(steps: Steps[Result], *, progress: bool = True) -> Result:
    """Takes all steps, with a bar for each stage, and returns the result."""
    bar, stage = None, None
    try:
        while True:
            step = next(steps)
            if bar is None or step.stage != stage:
                if bar is not None:
                    bar.close()
                stage = step.stage
                bar = tqdm(total=step.total, desc=stage, unit=step.unit, disable=not progress)
            bar.update(step.done - bar.n)
    except StopIteration as end:
        return end.value
    finally:
        steps.close()
        if bar is not None:
            bar.close()


class stepwise(Generic[Arguments, Result]):
    """A generator of steps as a function that takes them all; ``steps`` is the generator.

    The function has a further argument, ``progress``: whether to show bars.
    """

    def __init__(self, steps: Callable[Arguments, Steps[Result]]):
        functools.update_wrapper(self, steps)
        self.steps = steps

    def __call__(self, *args: Any, progress: bool = True, **kwargs: Any) -> Result:
        return take_all(self.steps(*args, **kwargs), progress=progress)


class Stopwatch:
    """A time limit that runs only within its ``with`` blocks, not between the steps.

    Attributes:
        left: Seconds that are left.
        cut_short: Whether any work ended because of it.
    """

    def __init__(self, seconds: float = math.inf):
        self.left = seconds
        self.cut_short = False

    def __enter__(self) -> "Stopwatch":
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.left -= time.monotonic() - self._start
