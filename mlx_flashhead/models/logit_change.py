"""A model's own change of its head's logits (a scale, a softcap, a cast), by the model's own code
with given logits in place of its head's."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..head.flash_head import FlashHead
from .install import installed_head
from .libraries import architecture, forward
from .model_errors import UnsupportedHeadError

LogitChange = Callable[[mx.array], mx.array]

_known: WeakKeyDictionary[FlashHead, LogitChange] = WeakKeyDictionary()


def logit_change_of(model: nn.Module) -> LogitChange:
    """The function (R, V) → (R, V) from the FlashHead's logits to those of ``model``, which keeps
    bounds; UnsupportedHeadError if a token's result depends on anything but its logit, or a larger
    logit may become a smaller one."""
    head = installed_head(model)
    if head not in _known:
        _known[head] = _learn(model, head)
    return _known[head]


def _run(model: nn.Module, logits: mx.array, token: int = 0) -> mx.array:
    """The model's result when its head gives ``logits`` (1, 1, V)."""
    with installed_head(model).intercepted(lambda _: logits):
        return forward(model, mx.array([[token]]))


def _learn(model: nn.Module, head: FlashHead) -> LogitChange:
    keys = mx.random.split(mx.random.key(0), 3)
    low, high = (mx.random.normal((1, 1, head.vocab_size), scale=20, key=key) for key in keys[:2])
    changed = _run(model, low)
    if changed is low:
        return unchanged
    mixed = mx.random.uniform(shape=low.shape, key=keys[2]) < 0.5
    apart = mx.where(mixed, changed, _run(model, high, token=1))
    together = _run(model, mx.where(mixed, low, high))
    keeps_bounds = (changed <= _run(model, low + 1.0)).all()
    if apart.shape != low.shape or not (
        keeps_bounds & mx.allclose(apart, together, rtol=1e-4, atol=1e-4)
    ):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model mixes or inverts the logits of different tokens."
        )
    # the model's Python code runs once, while this is traced
    run = mx.compile(lambda logits: _run(model, logits[None])[0])

    def change(logits: mx.array) -> mx.array:
        rows = [run(logits[i : i + 1]) for i in range(len(logits))]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    return change


def unchanged(logits: mx.array) -> mx.array:
    """The change of most models: none."""
    return logits
