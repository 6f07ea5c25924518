"""Finds the output projection of any model in one traced pass: the last module that has a row for
each token and whose output is as wide as the logits. Records its inputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.matrix import AFFINE, ARRAYS, Matrix
from .compat.mlx_vlm import own_head
from .errors import UnsupportedHeadError
from .observed import with_methods
from .vlm import architecture, check_writes_text, forward, is_vlm

LINEAR, EMBEDDING = "__call__", "as_linear"


@dataclass(frozen=True)
class HeadLocation:
    module: nn.Module  # the output projection itself
    path: str  # its dotted name in the model, such as "lm_head" or "model.embed_tokens"
    method: str  # "__call__" for a linear layer, "as_linear" for a tied embedding
    hidden_dtype: mx.Dtype = mx.float32  # of its input states

    @property
    def tied(self) -> bool:
        return self.method == EMBEDDING

    def rows(self) -> Matrix:
        module = self.module
        arrays: dict[str, Any] = {name: module.get(name) for name in (*ARRAYS, "bias")}
        if "scales" not in module:
            return Matrix(**arrays)
        mode = getattr(module, "mode", AFFINE)
        return Matrix(**arrays, group_size=module.group_size, bits=module.bits, mode=mode)


def find_head(model: nn.Module) -> HeadLocation:
    """The output projection of ``model``, found by tracing one forward pass; UnsupportedHeadError
    if no module's output is the logits, or the model does not run."""
    check_writes_text(model)
    weighted = [module for module in model.modules() if _has_rows(module)]
    calls: list[tuple[int, HeadLocation]] = []  # each with the width of its output

    def record(module, method, args, output):
        hidden = args[0] if args else None
        if not (isinstance(hidden, mx.array) and isinstance(output, mx.array)):
            return
        if mx.issubdtype(hidden.dtype, mx.floating):
            calls.append((output.shape[-1], HeadLocation(module, "", method, hidden.dtype)))

    name, home = architecture(model), "mlx-vlm" if is_vlm(model) else "mlx-lm"
    try:
        with _observed(weighted, record):
            vocab_size = forward(model, mx.array([[0]])).shape[-1]
    except Exception as error:  # whatever the model's code raises
        check_writes_text(model, runs=False)
        raise UnsupportedHeadError(
            f"{home}'s code of this {name!r} model fails on a token by itself "
            f"({type(error).__name__}: {error}), so it cannot be served with FlashHead either."
        ) from error
    whole = [call for width, call in calls if width == call.module["weight"].shape[0] == vocab_size]
    heads = [call.module for call in whole]
    for path, module in model.named_modules():
        if {"lora_a", "lora_b"} <= module.keys() and (
            module.lora_b.shape[-1] == vocab_size  # DoRA multiplies the rows itself
            or (heads and any(part is heads[-1] for part in module.values()))
        ):
            raise UnsupportedHeadError(
                f"The output projection {path!r} carries a LoRA adapter, which must be fused "
                "first: run mlx_lm.fuse, then use the fused model."
            )
    if not heads:
        raise UnsupportedHeadError(
            f"The output projection of this {name!r} model cannot be intercepted (its {vocab_size} "
            f"logits come from no layer of its own): use it with {home}, without FlashHead."
        )
    if sum(head is heads[-1] for head in heads) > 1:
        raise UnsupportedHeadError(
            f"This {name!r} model uses its output projection more than once per token, which "
            f"FlashHead does not support: use it with {home}, without FlashHead."
        )
    path = next(path for path, module in model.named_modules() if module is heads[-1])
    return replace(whole[-1], path=path)


def _has_rows(module: nn.Module) -> bool:
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2


def drafter_head(drafter: nn.Module, target: nn.Module) -> HeadLocation | None:
    """Where a drafter of mlx-vlm makes its logits, if its head is its own and no retrieval."""
    head = own_head(drafter, target)
    if head is None:
        return None
    module, method = (head, LINEAR) if isinstance(head, nn.Module) else (head.__self__, EMBEDDING)
    path = next(path for path, other in drafter.named_modules() if other is module)
    arrays = (a for part in drafter.modules() for a in part.values() if isinstance(a, mx.array))
    dtype = next(a.dtype for a in arrays if mx.issubdtype(a.dtype, mx.floating))
    return HeadLocation(module, path, method, hidden_dtype=dtype)


def check_plain_product(location: HeadLocation) -> None:
    """Checks on a random state that the layer multiplies by its rows: an UnsupportedHeadError for
    sharded, rotated or otherwise special layers."""
    rows, module = location.rows(), location.module
    hidden = mx.random.normal((1, rows.hidden_size), key=mx.random.key(0))
    hidden = hidden.astype(location.hidden_dtype)
    expected, actual = rows.matmul(hidden), getattr(module, location.method)(hidden)
    # a special layer differs by the size of its logits, a plain one by the rounding of 16 bits
    allowed = 0.02 * mx.max(mx.abs(expected))
    if expected.shape != actual.shape or not (mx.abs(expected - actual) <= allowed).all():
        raise UnsupportedHeadError(
            f"The output projection {location.path!r} ({type(module).__name__}) is not a plain "
            "product with its rows, which FlashHead needs: use the model without FlashHead."
        )


@contextmanager
def recorded_hidden(location: HeadLocation) -> Iterator[list[mx.array]]:
    """Within the block, collects every array (B, L, D) that enters the head, unevaluated."""
    states: list[mx.array] = []

    def record(module, method, args, output):
        if module is location.module and method == location.method:
            states.append(args[0])

    with _observed([location.module], record):
        yield states


@contextmanager
def _observed(modules: Iterable[nn.Module], record: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calls of the head-like methods of layers are passed to ``record``."""
    under_way: set[tuple[int, str]] = set()

    def observing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            key = (id(self), name)
            if key in under_way:  # a call of the parent's method belongs to this call
                return original(self, *args, **kwargs)
            under_way.add(key)
            output = original(self, *args, **kwargs)
            under_way.remove(key)
            record(self, name, args, output)
            return output

        return call

    def methods(cls: type) -> dict[str, Callable[..., Any]]:
        names = [name for name in (LINEAR, EMBEDDING) if hasattr(cls, name)]
        return {name: observing(name, getattr(cls, name)) for name in names}

    with with_methods(modules, methods):
        yield
