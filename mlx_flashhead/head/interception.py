"""Who makes the logits of a head's calls in this thread: a loop that needs the states alone."""

from collections.abc import Callable
from threading import local

import mlx.core as mx

Projection = Callable[[mx.array], mx.array]  # hidden (..., D) → logits (..., V)
_taken = local()  # by the head's id


def projection_in_place_of(head: object) -> Projection | None:
    """What makes the logits of a head's calls in this thread; None for the head itself."""
    found: Projection | None = vars(_taken).get(str(id(head)))
    return found


class Interception:
    """A block in which ``project`` makes the logits of each call of ``head`` in this thread.

    Another thread may run the model at the same time.
    """

    def __init__(self, head: object, project: Projection):
        self._name = str(id(head))
        self._project = project
        self._before: Projection | None = None

    def __enter__(self) -> None:
        taken = vars(_taken)
        self._before = taken.get(self._name)
        taken[self._name] = self._project

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del vars(_taken)[self._name]
        else:
            vars(_taken)[self._name] = self._before
