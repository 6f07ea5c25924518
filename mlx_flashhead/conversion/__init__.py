"""From a model to an index: hidden states, clusters, centroids, probes.

The work is done in short steps, which a caller can advance between other work, or drop: generators
that yield a `Step` after each part, and return their result.
"""

from collections.abc import Generator
from typing import NamedTuple, TypeVar

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
                bar.total = bar.n  # a stage may end before its total, by its time limit
                bar.close()
                bar, shown = tqdm(total=total, desc=stage, unit=unit, disable=not progress), stage
            bar.update(done - bar.n)
    except StopIteration as end:
        bar.total = bar.n
        return end.value
    finally:
        steps.close()
        bar.close()
