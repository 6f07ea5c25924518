"""The states with which the normal (dense) head of a model is called."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import mlx.core as mx
import mlx.nn as nn

from ..models.locate import find_head, recorded_inputs
from .step import WideSteps


class HeadStates:
    """Hears the head of a model, and those of its twins.

    Args:
        model: Of mlx-lm, without a FlashHead, which hands out its states itself.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        location = find_head(model)
        self._path = location.path
        self._method = location.method
        self._heads: dict[int, nn.Module] = {id(model): location.module}

    def noted(self, states: list[mx.array]) -> AbstractContextManager[None]:
        """A block in which the states (R, n, D) of each call of a head are added to ``states``."""
        return recorded_inputs(self._of_all(), self._method, states)

    def _of_all(self) -> Iterator[nn.Module]:
        """The head of the model, and that of each twin."""
        for model in (self._model, *WideSteps.of(self._model).twins):
            if id(model) not in self._heads:
                self._heads[id(model)] = dict(model.named_modules())[self._path]
            yield self._heads[id(model)]
