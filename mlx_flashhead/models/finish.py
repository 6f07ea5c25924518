"""What a model does with its head's logits before it returns them: a scale, a softcap, a cast.

Nothing is assumed of an architecture. The model's own code runs with given logits in place of its
head's, and what it returns is what it makes of them. Its layers do not feed that result, so nothing
of them is computed; MLX's compiler keeps the few operations that are left.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..head.flash_head import FlashHead
from .errors import UnsupportedHeadError
from .install import installed_head, installed_module

Finish = Callable[[mx.array], mx.array]

_known: WeakKeyDictionary[FlashHead, Finish] = WeakKeyDictionary()


def finish_of(model: nn.Module) -> Finish:
    """The function (R, V) → (R, V) that makes the logits of ``model`` of its FlashHead's.

    Raises:
        ValueError: If the model has no FlashHead.
        UnsupportedHeadError: If what becomes of a token's logit depends on anything else.
    """
    head = installed_head(model)
    if head not in _known:
        _known[head] = _learn(model, head)
    return _known[head]


class _Answer:
    """Stands in for a FlashHead and answers with given logits."""

    def __init__(self, head: FlashHead, logits: mx.array):
        self._head, self._logits = head, logits

    def __call__(self, hidden: mx.array) -> mx.array:
        return self._logits

    def __getattr__(self, name):
        return getattr(self._head, name)


def _run(model: nn.Module, logits: mx.array, token: int = 0) -> mx.array:
    """What the model returns where its head gives ``logits`` (1, 1, V)."""
    module: Any = installed_module(model)
    head = module._flash_head
    module._flash_head = _Answer(head, logits)
    try:
        output = model(mx.array([[token]]))
    finally:
        module._flash_head = head
    return output[0] if isinstance(output, tuple) else output


def _learn(model: nn.Module, head: FlashHead) -> Finish:
    keys = mx.random.split(mx.random.key(0), 3)
    low, high = (mx.random.normal((1, 1, head.vocab_size), scale=20, key=key) for key in keys[:2])
    finished = _run(model, low)
    if finished is low:
        return unchanged
    mixed = mx.random.uniform(shape=low.shape, key=keys[2]) < 0.5
    apart = mx.where(mixed, finished, _run(model, high, token=1))
    together = _run(model, mx.where(mixed, low, high))
    if apart.shape != low.shape or not mx.allclose(apart, together, rtol=1e-4, atol=1e-4):
        name = type(model).__module__.rsplit(".", 1)[-1]
        raise UnsupportedHeadError(
            f"This {name!r} model changes its logits in a way that is not each token's own, so "
            "logits processors cannot be exact with FlashHead: use dense=True with them."
        )
    # the model's Python code runs while this is traced, and not for each token
    run = mx.compile(lambda logits: _run(model, logits[None])[0])

    def finish(logits: mx.array) -> mx.array:
        rows = [run(logits[i : i + 1]) for i in range(len(logits))]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    return finish


def unchanged(logits: mx.array) -> mx.array:
    """What most models do: nothing."""
    return logits
