"""Work in short steps, which a caller can advance between other work, or drop.

A function in steps is a generator: it yields a `Step` after each part of its work and returns its
result. `stepwise` lets it be called like any other function too, which takes all steps at once.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

Result = TypeVar("Result")


class Step(NamedTuple):
    """How far a stage of the work is: ``done`` of ``total`` units."""

    stage: str
    done: int
    total: int
    unit: str


Steps = Generator[Step, None, Result]


def take_all(steps: Steps[Result], *, progress: bool = True) -> Result:
    """Takes all steps, with a bar for each stage, and returns the result."""
    bar, shown = tqdm(disable=True), ""
    try:
        while True:
            stage, done, total, unit = next(steps)
            if stage != shown:
                bar.close()
                bar, shown = tqdm(total=total, desc=stage, unit=unit, disable=not progress), stage
            bar.update(done - bar.n)
    except StopIteration as end:
        return end.value
    finally:
        steps.close()
        bar.close()


def stepwise(steps: Callable[..., Steps[Any]]) -> Any:
    """A generator of steps as a function that takes them all; ``steps`` is the generator.

    The function has a further argument, ``progress``: whether to show bars.
    """

    @functools.wraps(steps)
    def take(*args: Any, progress: bool = True, **kwargs: Any) -> Any:
        return take_all(steps(*args, **kwargs), progress=progress)

    take.steps = steps  # type: ignore[attr-defined]
    return take
