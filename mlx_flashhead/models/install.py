"""Installs a FlashHead on a model's output projection, and detaches it.

The module keeps its names and place; its class becomes a subclass. Its rows move into the
FlashHead, which gives them back when they are read.
"""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.clustered import Centroids
from ..head.flash_head import FlashHead
from ..interop.head_weights import keep_from_weights
from .finer_head import restore_rows
from .flash_modules import FlashEmbedding, FlashLinear, FlashModule, subclass
from .locate import EMBEDDING, HeadLocation, check_plain_product, find_head
from .vlm import is_vlm

# An attribute of the model that got a FlashHead, and of its copies.
ROOT = "_has_flash_head"
NO_FLASH_HEAD = "This model has no FlashHead: load it with mlx_flashhead.load."


def _installed_module(model: nn.Module) -> Any:
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, FlashModule):
                return module
    return None


def get_flash_head(model: nn.Module) -> FlashHead | None:
    """The FlashHead installed on ``model``, or None when the model is dense."""
    module = _installed_module(model)
    if module is None:
        return None
    return module._flash_head


def installed_head(model: nn.Module) -> FlashHead:
    """The FlashHead installed on ``model``, or ValueError."""
    head = get_flash_head(model)
    if head is None:
        raise ValueError(NO_FLASH_HEAD)
    return head


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
    # They leave the memory as the module lets them go.
    del rows
    mx.eval(head.arrays())
    module: Any = location.module
    # Each array keeps its name.
    for name in head.clustered.rows.arrays():
        module[name] = None
    # MLX's cache of memory holds the rows in their old order.
    mx.clear_cache()
    module._flash_head = head
    # MLX's dtypes do not pickle, but their names do.
    module._hidden_dtype = str(location.hidden_dtype).removeprefix("mlx.core.")
    if location.method == EMBEDDING:
        subclass(module, FlashEmbedding)
    else:
        subclass(module, FlashLinear)
    vars(model)[ROOT] = True
    if is_vlm(model):
        keep_from_weights(FlashModule)
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
    # A finer head stays: it is the dense model's, too.
    _uninstall(dense)
    return dense


def _uninstall(model: nn.Module) -> None:
    module = _installed_module(model)
    head = installed_head(model)
    module.__class__ = type(module).__bases__[1]
    del module._flash_head, module._hidden_dtype, vars(model)[ROOT]
    for name, array in head.clustered.token_rows().arrays().items():
        mx.eval(array)
        module[name] = array
