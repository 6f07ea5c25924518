"""What a model does to its FlashHead's logits: found by calling it with some, once for a head."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..head.flash_head import FlashHead
from ..head.logit_map import IDENTITY, LogitMap, fit_logit_map
from .install import hidden_dtype, installed_head
from .vlm import forward

_logit_maps: WeakKeyDictionary[FlashHead, LogitMap | None] = WeakKeyDictionary()


def logit_map_of(model: nn.Module) -> LogitMap | None:
    """The map from the FlashHead's logits to the model's, such as a scale, a softcap or a cast.

    A loop asks when a text begins: the map is found once, and found anew where the model gives
    other logits than it says, as with a softcap that somebody has changed. Evaluates.

    Returns:
        The map; None if the model does something else, such as mixing the logits of tokens.
    """
    head = installed_head(model)
    known = _logit_maps.get(head, IDENTITY)
    if known is None:
        return None
    vocab_size = head.vocab_size
    dtype = head.clustered.rows.logits_dtype(hidden_dtype(model))
    some = mx.random.normal((1, 1, vocab_size), scale=20, key=mx.random.key(0)).astype(dtype)

    def change(logits: mx.array) -> mx.array:
        """What the model makes of its head's logits (1, L, V), into which it may write."""
        with head.intercepted(lambda _: logits):
            return forward(model, mx.array([[0]]))

    # It gets a copy.
    changed = change(mx.array(some))
    if mx.array_equal(some, changed):
        known = IDENTITY
    elif not mx.array_equal(known(some), changed):
        known = _find_logit_map(head, change, some, changed)
        if known is not None:
            # There are kernels for such a map.
            head.check_kernels(hidden_dtype(model), logit_map=known)
    _logit_maps[head] = known
    return known


def _find_logit_map(
    head: FlashHead, change: Callable[[mx.array], mx.array], some: mx.array, changed: mx.array
) -> LogitMap | None:
    """Finds the map that ``change`` applies to logits (1, L, V), as ``changed`` out of ``some``."""

    def change_values(values: mx.array) -> mx.array:
        """What it makes of any number of logits. Some models write to those of certain tokens.

        Of fewer than V at a position MLX would write beyond the end.
        """
        n_positions = -(-values.size // head.vocab_size)
        missing = n_positions * head.vocab_size - values.size
        padded = mx.pad(values, (0, missing))
        made = change(padded.reshape(1, n_positions, -1))
        return made.reshape(-1)[: values.size]

    # A model that looks at the number of positions fails.
    try:
        logit_map = fit_logit_map(change_values, some.dtype)
    except ValueError:
        return None
    # The values may have been fewer than the tokens.
    if logit_map is None or not mx.array_equal(logit_map(some), changed):
        return None
    if not head.applies(logit_map, some.dtype):
        return None
    return logit_map
