"""A twin of a model, which feeds several tokens at once with the bits of single steps.

It shares the model's arrays, its settings, which many models read at each call, and all parts that
treat each position by itself. Others have a class of their own:

- a linear layer multiplies each position as a single step does,
- an attention is called once per position, with what its cache holds then,
- a state space model takes its positions in turn.

No name of another package is replaced: the twin's classes have copies of the functions that they
change, with other globals.
"""

import copy
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..head.row_products import row_products
from ..models.compat.model_code import (
    global_names,
    is_attention,
    is_rotation,
    library_functions,
    takes_cache,
    with_globals,
)
from ..models.install import get_flash_head
from .parts import containers, settings_in
from .positions import Positions, at, per_position, per_position_value
from .stand_ins import KeyValueStandIn, PastStandIn, per_position_stand_in
from .states import call_layer, call_part, made_of


class NoWideStepError(Exception):
    """A model does something for which no step of several tokens is known."""


def in_rows(function: Callable[[mx.array], Any], x: mx.array) -> Any:
    """Calls a function of an array (..., T, K) for each of its T positions, as single steps do."""
    if x.ndim < 2 or x.shape[-2] == 1:
        return function(x)
    results = [function(x[..., j : j + 1, :]) for j in range(x.shape[-2])]
    return _joined(results, axis=-2)


def product(layer: nn.Module, single: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """The product of each position of ``x`` (..., T, K) with a layer's weights: (..., T, N).

    Args:
        layer: A linear layer or an embedding.
        single: The product that single steps call.
        x: The positions.
    """
    n_states = x.size // x.shape[-1]
    one_each = n_states > 1 and n_states == x.shape[-2]
    if one_each and isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        # This reads the weights once.
        products = row_products(x, layer)
        if products is not None:
            return products
    return cast(mx.array, in_rows(single, x))


def _joined(results: list[Any], axis: int) -> Any:
    """Arrays of each position as one; of tuples, a tuple."""
    if isinstance(results[0], tuple):
        return tuple(_joined(list(parts), axis) for parts in zip(*results, strict=True))
    return mx.concatenate(results, axis=axis)


class _Linear(nn.Module):
    """A linear layer."""

    def __call__(self, x: Any) -> Any:
        if isinstance(x, Positions):
            whole = product(self, super().__call__, _joined(x.parts, axis=-2))
            return Positions(mx.split(whole, len(x.parts), axis=-2))
        return product(self, super().__call__, x)


class _Embedding(nn.Module):
    """An embedding, whose transposed weights may make the logits."""

    def as_linear(self, x: mx.array) -> mx.array:
        return product(self, cast(Any, super()).as_linear, x)


class _Matrix(nn.Module):
    """A part with a small matrix of its own, such as a router."""

    weight: mx.array

    def __call__(self, *args: Any, **named: Any) -> Any:
        x = args[0]
        alone = len(args) == 1 and not named and isinstance(x, mx.array)
        if alone and x.ndim <= 3 and x.shape[-1] == self.weight.shape[-1]:
            return in_rows(super().__call__, x)
        return per_position(super().__call__)(*args, **named)


class _Rotation(nn.Module):
    """A rotation whose frequencies depend on the length of the text, as with dynamic NTK."""

    def __call__(self, x: Any, offset: Any = 0) -> Any:
        rotate = super().__call__
        if isinstance(x, Positions) or x.shape[-2] == 1:
            return per_position(rotate)(x, offset)
        rotated = [rotate(x[..., j : j + 1, :], offset + j) for j in range(x.shape[-2])]
        return mx.concatenate(rotated, axis=-2)


class _Layer(nn.Module):
    """A layer that gets caches, and may write a state."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return call_layer(super().__call__, args, named)


class _Part(nn.Module):
    """A part with weights of more than one axis."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        call = super().__call__
        if len(args) == 1 and not named and isinstance(args[0], mx.array):
            return call_part(self, call, args[0])
        return call(*args, **named)


class _PerPosition(nn.Module):
    """A part whose operations run once per position within an attention."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        call = super().__call__
        # The first argument of a layer is none, but its mask may be.
        if args and isinstance(args[0], Positions):
            call = per_position(call)
        return call(*args, **named)


class _PerPositionAttention(nn.Module):
    """An attention whose operations run once per position."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        call = super().__call__
        arrays = [each for each in (*args, *named.values()) if isinstance(each, mx.array)]
        if not arrays or arrays[0].shape[1] == 1:
            return call(*args, **named)
        n_positions = arrays[0].shape[1]
        own_args = [_as_positions(value, n_positions) for value in args]
        own_named = {name: _as_positions(value, n_positions) for name, value in named.items()}
        return _whole(call(*own_args, **own_named))


def _as_positions(value: Any, n_positions: int) -> Any:
    """An attention's argument, as :class:`Positions` if it is (…, T, K)."""
    if isinstance(value, mx.array):
        axis = value.ndim - 2
        if axis >= 0 and value.shape[axis] == n_positions:
            return Positions(mx.split(value, n_positions, axis=axis))
    return per_position_stand_in(value)


def _whole(value: Any) -> Any:
    """The result of an attention for all positions."""
    if isinstance(value, tuple):
        return tuple(map(_whole, value))
    if isinstance(value, Positions) and all(_is_state(part) for part in value.parts):
        return mx.concatenate(value.parts, axis=1)
    return value


def _is_state(part: Any) -> bool:
    return isinstance(part, mx.array) and part.ndim == 3 and part.shape[1] == 1


# The functions in the place of mlx-lm's, by their names.


def _attend(single: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attend(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attends from each position (B, H, T, D) to what its own single step would find."""
        if isinstance(cache, PastStandIn):
            return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
        options: dict[str, Any] = {"scale": scale}
        if sinks is not None:
            options["sinks"] = sinks
        n_positions = queries.shape[2]
        if n_positions == 1:
            return single(queries, keys, values, cache=cache, mask=mask, **options)
        if not isinstance(keys, Positions):
            raise NoWideStepError("An attention without a cache of its own.")
        if isinstance(cache, KeyValueStandIn):
            cache = cache.cache
        # Of (1, T, H, D) MLX reads a position where it lies.
        by_position = mx.contiguous(queries.swapaxes(1, 2))
        attended = []
        for j in range(n_positions):
            query = by_position[:, j : j + 1].swapaxes(1, 2)
            own_keys = at(keys, j)
            own_mask = _mask_at(mask, j, n_positions, own_keys)
            found = single(query, own_keys, at(values, j), cache=cache, mask=own_mask, **options)
            attended.append(found.swapaxes(1, 2))
        # The transposed form is what a layer makes of it next.
        return mx.concatenate(attended, axis=1).swapaxes(1, 2)

    return attend


def _mask_at(mask: Any, j: int, n_positions: int, keys: Any) -> Any:
    """The mask of position ``j`` in a single step."""
    if mask is None or mask == "causal":
        return None
    if isinstance(mask, Positions):
        return mask.parts[j]
    if not isinstance(keys, mx.array) or mask.shape[-2] != n_positions:
        raise NoWideStepError("An attention has a mask of a form that is not known.")
    # A model has made it itself.
    return mask[..., j : j + 1, : keys.shape[-2]]


def _in_turn(single: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., Any]:
    def in_turn(
        x: mx.array,
        A_log: mx.array,
        B: mx.array,
        C: mx.array,
        D: mx.array,
        dt: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        time_step_limit: tuple[float, float] = (0.001, 100.0),
        mask: mx.array | None = None,
        lengths: None = None,
    ) -> tuple[mx.array, mx.array]:
        """Takes the positions (B, T, …) of a state space model one after another."""
        outputs = []
        for j in range(x.shape[1]):
            here = slice(j, j + 1)
            own_mask = None
            if mask is not None:
                own_mask = mask[:, here]
            y, state = single(
                x[:, here],
                A_log,
                B[:, here],
                C[:, here],
                D,
                dt[:, here],
                dt_bias,
                state,
                time_step_limit,
                own_mask,
                lengths,
            )
            outputs.append(y)
        return mx.concatenate(outputs, axis=1), cast(mx.array, state)

    return in_turn


def _scan(single: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., Any]:
    def scan(x: mx.array, a: mx.array, h0: mx.array | None) -> tuple[mx.array, mx.array]:
        """Takes the positions (B, T, D) of a recurrence whose layer multiplies itself."""
        x, a = made_of("scan", x, a)
        return single(x, a, h0)

    return scan


EXCHANGED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attend,
    "ssm_update": _in_turn,
    "rnn_scan": _scan,
}


def twin_of(model: nn.Module, *, apart: bool = False) -> nn.Module:
    """The twin of a model of mlx-lm.

    Args:
        model: The model.
        apart: Whether each operation of an attention runs once per position, not its call alone.
    """
    named_arrays: Any = tree_flatten(model.parameters())
    arrays = [array for _, array in named_arrays]
    shared = [get_flash_head(model), *arrays, *settings_in(model)]
    twin = copy.deepcopy(model, {id(each): each for each in shared})
    classes: dict[type, type] = {}
    for part in containers(twin):
        if isinstance(part, nn.Module):
            cls = type(part)
            if cls not in classes:
                classes[cls] = _class_in_twin(part, apart=apart)
            part.__class__ = classes[cls]
    return twin


def _class_in_twin(module: nn.Module, *, apart: bool) -> type:
    """A class like the module's, but for what the twin does otherwise."""
    cls = type(module)
    mixin = _mixin_of(module)
    exchange = exchanged_globals
    if apart and is_attention(cls):
        exchange = per_position_globals
        mixin = mixin or _PerPositionAttention
    elif apart:
        mixin = mixin or _PerPosition
    functions = _functions(cls, exchange)
    if functions:
        cls = type(cls.__name__, (cls,), functions)
    around = (_around(module), mixin)
    mixins = tuple(each for each in around if each is not None)
    if not mixins:
        return cls
    return type(cls.__name__, (*mixins, cls), {})


def _around(module: nn.Module) -> type | None:
    """What is done around the calls of a module, so that a state can be made again."""
    if takes_cache(type(module)):
        return _Layer
    own: list[Any] = list(dict.values(cast(Any, module)))
    if any(isinstance(each, mx.array) and each.ndim > 1 for each in own):
        return _Part
    return None


def _mixin_of(module: nn.Module) -> type | None:
    """What a part that multiplies does in the twin; None for others."""
    if type(module) in (nn.Linear, nn.QuantizedLinear):
        return _Linear
    if type(module) in (nn.Embedding, nn.QuantizedEmbedding):
        return _Embedding
    if is_rotation(type(module)):
        return _Rotation
    weight = dict.get(cast(Any, module), "weight")
    if not isinstance(weight, mx.array) or weight.ndim != 2:
        return None
    if not mx.issubdtype(weight.dtype, mx.floating):
        return None
    return _Matrix


def exchanged_globals(names: Mapping[str, Any]) -> dict[str, Any]:
    """The globals of an attention's or a state space model's code that the twin exchanges."""
    return {name: make(names[name]) for name, make in EXCHANGED.items() if name in names}


def per_position_globals(names: Mapping[str, Any]) -> dict[str, Any]:
    """Globals for code that has :class:`Positions` in the place of arrays."""
    own = {name: value for name, value in names.items() if not name.startswith("__")}
    return {name: per_position_value(value) for name, value in own.items()}


def _functions(
    cls: type, exchange: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, FunctionType]:
    """Copies of mlx-lm's functions of a class that use exchanged globals, by name."""
    copies: dict[str, FunctionType] = {}
    for _, name, function in library_functions(cls):
        used = {key: function.__globals__[key] for key in global_names(function)}
        exchanged = exchange(used)
        if exchanged and name not in copies:
            copies[name] = with_globals(function, name, exchanged)
    return copies
