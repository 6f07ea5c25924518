"""The bytes of the weights that a step of a model reads: what a draft costs beside a step."""

import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import UnsupportedHeadError
from .locate import find_head

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class StepBytes:
    """The bytes that a step of a model reads for a token.

    Attributes:
        body: Of all weights but the head's and the embeddings.
        head: Of the head's; 0 where none is found, so that it counts as the body's.
    """

    body: int
    head: int

    def all(self, head_share: float = 1.0) -> float:
        """All of them, where this share of the head is read."""
        return self.body + head_share * self.head


# Those of the models that are in use, by the ids of these.
_known: dict[int, StepBytes] = {}


def step_bytes_of(model: nn.Module) -> StepBytes:
    """The bytes that a step of a model reads. The first call traces the model once.

    Args:
        model: Of mlx-lm.
    """
    if id(model) not in _known:
        _known[id(model)] = _counted(model)
        weakref.finalize(model, _known.pop, id(model), None)
    return _known[id(model)]


def nbytes_read(module: nn.Module, n_active: int) -> int:
    """The bytes of a module's own arrays that a token reads; of experts, of the active ones."""
    nbytes = 0.0
    for array in dict.values(module):
        if isinstance(array, mx.array):
            share = 1.0
            if array.ndim == 3:
                share = min(1.0, n_active / len(array))
            nbytes += array.nbytes * share
    return round(nbytes)


def n_active_experts(args: Any) -> int:
    """The experts of a layer that a token reads, by a model's arguments."""
    name = "num_experts_per_tok"
    text = getattr(args, "text_config", None)
    if isinstance(text, dict):
        text = SimpleNamespace(**text)
    return int(getattr(args, name, None) or getattr(text, name, None) or 1)


def _counted(model: nn.Module) -> StepBytes:
    # A model may keep no arguments.
    n_active = n_active_experts(getattr(model, "args", None))
    left_out: tuple[nn.Module, ...] = ()
    n_head = 0
    try:
        location = find_head(model)
    except UnsupportedHeadError:
        location = None
    if location is not None:
        left_out = (location.module,)
        n_head = sum(array.nbytes for array in location.rows().arrays().values())
    n_body = 0
    for module in model.modules():
        is_left_out = any(module is each for each in left_out)
        if not is_left_out and not isinstance(module, EMBEDDINGS):
            n_body += nbytes_read(module, n_active)
    return StepBytes(n_body, n_head)
