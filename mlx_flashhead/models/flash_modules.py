"""A model's output projection with a FlashHead in it, whose arrays look as if they were there."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head.flash_head import FlashHead

# The methods of nn.Module come from the class beside those below.
_Module: Any = object


def subclass(module: nn.Module, mixin: type) -> None:
    """Makes a module one of a subclass of its class, with a mixin before it."""
    base = type(module)
    module.__class__ = type(base.__name__, (mixin, base), {"__module__": base.__module__})


def _unpickled(mixin: type, base: Any, arrays: dict, attributes: dict) -> nn.Module:
    module = base.__new__(base)
    dict.update(module, arrays)
    vars(module).update(attributes)
    subclass(module, mixin)
    return module


class FlashModule(_Module):
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
        if self._keeps(key):
            return self._arrays()[key]
        return super().__getitem__(key)

    def get(self, key, default=None):
        """An array by its name. Other names, which nn.Module looks up here, gather no rows."""
        if self._keeps(key):
            return self._arrays()[key]
        return super().get(key, default)

    def items(self):
        """The names and arrays, those of the FlashHead in the model's own order."""
        arrays = self._arrays()
        return [(key, arrays.get(key, value)) for key, value in super().items()]

    def values(self):
        """The arrays of :meth:`items`."""
        return [value for _, value in self.items()]

    def __setitem__(self, key, value):
        if self._keeps(key):
            raise ValueError(
                f"The {key} of an output projection under FlashHead cannot be changed: call "
                "mlx_flashhead.detach(model) first, then change it, then attach again."
            )
        super().__setitem__(key, value)


class FlashLinear(FlashModule):
    """A linear layer: projects through a FlashHead."""

    __call__ = FlashModule._project


class FlashEmbedding(FlashModule):
    """A tied embedding: looks tokens up in the reordered rows, projects through a FlashHead."""

    as_linear = FlashModule._project

    def __call__(self, token_ids: mx.array) -> mx.array:
        """Looks tokens up: ids (…) → (…, D)."""
        return self._flash_head.clustered.embeddings(token_ids)
