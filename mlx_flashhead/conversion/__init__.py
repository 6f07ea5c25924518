"""From a model to an index: hidden states, clusters, centroids, probes.

The work is done in short parts, which a caller can advance between other work, or drop. It is
written as generators, the type `Task`: they yield a `Progress` after each part, and return their
result.
"""

from collections.abc import Generator
from typing import NamedTuple, TypeVar

from ..common.bars import Bar

Result = TypeVar("Result")


class Progress(NamedTuple):
    """What a part of a stage has done: so many units of ``total``, or of fewer.

    A stage may end before its total, by its time limit.

    Attributes:
        stage: The name of the stage.
        added: The number of units that the part has done.
        total: The number of the stage's units, such as tokens or rows.
        kept: Whether an earlier build has done them.
    """

    stage: str
    added: int
    total: int
    kept: bool = False


Task = Generator[Progress, None, Result]


def run_task(task: Task[Result], *, progress: bool = True) -> Result:
    """Does all parts of a task that are left.

    Args:
        task: The task, which may have begun.
        progress: Show a bar for each stage.

    Returns:
        The task's result.
    """
    bar = Bar("", 0, disable=True)
    shown = ""
    try:
        while True:
            part = next(task)
            if part.stage != shown:
                bar.total = bar.n
                bar.close()
                bar = Bar(part.stage, part.total, disable=not progress)
                shown = part.stage
            bar.update(min(part.added, part.total - bar.n))
    except StopIteration as end:
        bar.total = bar.n
        return end.value
    finally:
        task.close()
        bar.close()
