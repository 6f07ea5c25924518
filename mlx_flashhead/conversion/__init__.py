"""From a model to an index: hidden states, clusters, centroids, probes.

The work is done in short parts, which a caller can advance between other work, or drop. It is
written as generators, the type `Task`: they yield a `Progress` after each part, and return their
result.
"""

from collections.abc import Generator
from typing import NamedTuple, TypeVar

from tqdm import tqdm

Result = TypeVar("Result")
FORM = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # units differ by stage


class Progress(NamedTuple):
    """What a part of a stage has done: so many units of ``total``, or of fewer."""

    stage: str
    added: int
    total: int
    unit: str
    kept: bool = False  # whether an earlier build has done them


Task = Generator[Progress, None, Result]


def run_task(task: Task[Result], *, progress: bool = True) -> Result:
    """Does all parts of a task that are left.

    Args:
        task: The task, which may have begun.
        progress: Show a bar for each stage.

    Returns:
        The task's result.
    """
    bar = tqdm(disable=True)
    shown = ""
    try:
        while True:
            stage, added, total, _, _ = next(task)
            if stage != shown:
                bar.total = bar.n  # a stage may end before its total, by its time limit
                bar.close()
                bar = tqdm(total=total, desc=stage, bar_format=FORM, disable=not progress)
                shown = stage
            bar.update(min(added, total - bar.n))
    except StopIteration as end:
        bar.total = bar.n
        return end.value
    finally:
        task.close()
        bar.close()
