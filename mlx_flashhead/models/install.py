"""Installs a FlashHead on a model's output projection, and detaches it.

The module keeps its names and place; its class becomes a subclass. Its rows move into the
FlashHead, which gives them back when they are read.
"""

import copy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.clustered import Centroids
from ..head.flash_head import FlashHead
from ..head.logit_map import IDENTITY, LogitMap, fit_logit_map
from ..interop.head_weights import keep_from_weights
from .finer_head import restore_rows
from .locate import EMBEDDING, HeadLocation, check_plain_product, find_head
from .vlm import forward, is_vlm

_logit_maps: WeakKeyDictionary[FlashHead, LogitMap | None] = WeakKeyDictionary()
LIBRARIES = ("mlx", "mlx_lm", "mlx_vlm")
ROOT = "_has_flash_head"  # an attribute of the model that got a FlashHead, and of its copies
NO_FLASH_HEAD = "This model has no FlashHead: load it with mlx_flashhead.load."
_Module: Any = object  # the methods of nn.Module come from the class beside those below


def _installed_module(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        return None
    return next((m for m in model.modules() if isinstance(m, _FlashModule)), None)


def get_flash_head(model: nn.Module) -> FlashHead | None:
    """The FlashHead installed on ``model``, or None when the model is dense."""
    module = _installed_module(model)
    return None if module is None else module._flash_head


def installed_head(model: nn.Module) -> FlashHead:
    """The FlashHead installed on ``model``, or ValueError."""
    head = get_flash_head(model)
    if head is None:
        raise ValueError(NO_FLASH_HEAD)
    return head


def is_recognised(model: Any) -> bool:
    """Whether a model is the one that got its FlashHead, or a copy of it, and unchanged.

    A module around a model, or a changed one, may do anything with a text's tokens.
    """
    return is_librarys_model(model) and ROOT in vars(model)


def is_librarys_model(model: Any) -> bool:
    """Whether all parts of a model are of classes of mlx, mlx-lm or mlx-vlm, as they are there.

    Nobody has replaced their calls, and it is not being trained: dropout draws in each step.
    """
    if not isinstance(model, nn.Module) or model.training:
        return False
    classes: set[Any] = set(map(type, model.modules()))
    own = {cls.__bases__[1] if issubclass(cls, _FlashModule) else cls for cls in classes}
    return all(map(_is_libraries, own))


def _is_libraries(cls: type) -> bool:
    """Whether a class is the one that its library has under its name, and its call is its own."""
    home = sys.modules.get(cls.__module__)
    if getattr(home, cls.__qualname__, None) is not cls:
        return False
    calls: list[Any] = [getattr(cls, name, None) for name in ("__call__", "as_linear")]
    codes = [call.__code__ for call in calls if hasattr(call, "__code__")]
    from_library = cls.__module__.split(".")[0] in LIBRARIES
    return from_library and all(_in_libraries(code.co_filename) for code in codes)


@cache
def _in_libraries(filename: str) -> bool:
    """Whether a file of code is one of the libraries'."""
    there = (sys.modules[name] for name in LIBRARIES if name in sys.modules)
    places = [place for library in there for place in library.__path__]
    return any(Path(filename).is_relative_to(place) for place in places)


def hidden_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of the hidden states that reach the FlashHead of ``model``."""
    return getattr(mx, _installed_module(model)._hidden_dtype)


def install(
    model: nn.Module,
    token_ids: np.ndarray,
    centroids: Centroids,
    *,
    location: HeadLocation | None = None,
    **settings: Any,
) -> FlashHead:
    """Installs a FlashHead on a model. For a moment this needs the memory of a second head.

    Args:
        model: The model.
        token_ids: The clusters (C, cluster_size), with V in padded slots.
        centroids: Their centroids.
        location: The model's head, if it is known, and known to be a plain product.
        settings: Arguments of :class:`FlashHead`.

    Raises:
        ValueError: If there is a FlashHead already, the head is not supported, or an argument is
            not valid. The model is unchanged.
    """
    if get_flash_head(model) is not None:
        raise ValueError("FlashHead is already installed on this model: detach it first.")
    if location is None:
        location = find_head(model)
        check_plain_product(location)
    rows = location.rows()
    head = FlashHead(rows, token_ids, centroids, **settings)
    head.check_kernels(location.hidden_dtype, rows)
    del rows  # they leave the memory as the module lets them go
    mx.eval(head.arrays())
    module: Any = location.module
    for name in head.clustered.rows.arrays():
        module[name] = None  # which keeps its name and place
    mx.clear_cache()  # it holds the rows in their old order
    module._flash_head = head
    # its name, since MLX's dtypes do not pickle
    module._hidden_dtype = str(location.hidden_dtype).removeprefix("mlx.core.")
    _subclass(module, _FlashEmbedding if location.method == EMBEDDING else _FlashLinear)
    vars(model)[ROOT] = True
    if is_vlm(model):
        keep_from_weights(_FlashModule)
    return head


def detach(model: nn.Module) -> None:
    """Restores the dense model, bit for bit, with the rows that it had before a finer head.

    Args:
        model: The model.

    Raises:
        ValueError: If it has neither a FlashHead nor a finer head.
    """
    installed = get_flash_head(model) is not None
    if installed:
        _uninstall(model)
    if not restore_rows(model) and not installed:
        raise ValueError("There is no FlashHead on this model to detach.")


def dense_copy(model: nn.Module) -> nn.Module:
    """A dense copy of a model with a FlashHead.

    It shares all arrays but its rows, since their place in memory alone changes the time of a step
    by up to a tenth on a CPU.
    """
    dense = copy.deepcopy(model)
    _uninstall(dense)  # a finer head stays: it is the dense model's, too
    return dense


def _uninstall(model: nn.Module) -> None:
    module = _installed_module(model)
    head = installed_head(model)
    module.__class__ = type(module).__bases__[1]
    del module._flash_head, module._hidden_dtype, vars(model)[ROOT]
    for name, array in head.clustered.token_rows().arrays().items():
        mx.eval(array)
        module[name] = array


def _subclass(module: nn.Module, mixin: type) -> None:
    base = type(module)
    module.__class__ = type(base.__name__, (mixin, base), {"__module__": base.__module__})


def _unpickled(mixin: type, base: Any, arrays: dict, attributes: dict) -> nn.Module:
    module = base.__new__(base)
    dict.update(module, arrays)
    vars(module).update(attributes)
    _subclass(module, mixin)
    return module


class _FlashModule(_Module):
    """An installed module, whose dict holds None for each array that the FlashHead keeps.

    Reading such an array gives it in the model's own order, lazily. Writing it raises.
    """

    _flash_head: FlashHead
    _hidden_dtype: str

    def __reduce_ex__(self, protocol):
        """The class is made for it, and pickle could not find it by its name."""
        mixin, base = type(self).__bases__
        arrays = dict(dict.items(cast(dict, self)))
        return _unpickled, (mixin, base, arrays, dict(vars(self)))

    def _project(self, hidden: mx.array) -> mx.array:
        """(..., D) → (..., V), the normal (dense) head's unless a loop takes the call."""
        return self._flash_head(hidden)

    def _arrays(self) -> dict[str, mx.array]:
        return self._flash_head.clustered.token_rows().arrays()

    def _keeps(self, key: str) -> bool:
        return key in self._flash_head.clustered.rows.arrays()

    def __getitem__(self, key):
        return self._arrays()[key] if self._keeps(key) else super().__getitem__(key)

    def get(self, key, default=None):
        # nn.Module looks up most attributes here, which must not gather the rows
        return self._arrays()[key] if self._keeps(key) else super().get(key, default)

    def items(self):
        arrays = self._arrays()
        return [(key, arrays.get(key, value)) for key, value in super().items()]

    def values(self):
        return [value for _, value in self.items()]

    def __setitem__(self, key, value):
        if self._keeps(key):
            raise ValueError(
                f"The {key} of an output projection under FlashHead cannot be changed: call "
                "mlx_flashhead.detach(model) first, then change it, then attach again."
            )
        super().__setitem__(key, value)


class _FlashLinear(_FlashModule):
    __call__ = _FlashModule._project


class _FlashEmbedding(_FlashModule):
    """A tied embedding: looks tokens up in the reordered rows, projects through a FlashHead."""

    as_linear = _FlashModule._project

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self._flash_head.clustered.embeddings(token_ids)


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
        """What the model makes of its head's logits (1, R, V), into which it may write."""
        with head.intercepted(lambda _: logits):
            return forward(model, mx.array([[0]]))

    changed = change(mx.array(some))  # a copy
    if not mx.array_equal(known(some), changed):
        known = (
            IDENTITY
            if mx.array_equal(some, changed)
            else _find_logit_map(head, change, some, changed)
        )
        if known is not None and not known.identity:  # for which there are kernels of their own
            head.check_kernels(hidden_dtype(model), logit_map=known)
    _logit_maps[head] = known
    return known


def _find_logit_map(
    head: FlashHead, change: Callable[[mx.array], mx.array], some: mx.array, changed: mx.array
) -> LogitMap | None:
    """Finds the map that ``change`` applies to logits (1, R, V), as ``changed`` out of ``some``."""

    def change_values(values: mx.array) -> mx.array:
        """What it makes of any number of logits. Some models write to those of certain tokens.

        In rows of fewer than V MLX would write beyond the end.
        """
        n_rows = -(-values.size // head.vocab_size)
        padded = mx.pad(values, (0, n_rows * head.vocab_size - values.size))
        return change(padded.reshape(1, n_rows, -1)).reshape(-1)[: values.size]

    try:
        logit_map = fit_logit_map(change_values, some.dtype)
    except ValueError:  # it looks at the number of rows
        return None
    # the values may have been fewer than the tokens
    if logit_map is None or not mx.array_equal(logit_map(some), changed):
        return None
    return logit_map if head.applies(logit_map, some.dtype) else None
