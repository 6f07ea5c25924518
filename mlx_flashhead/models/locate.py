"""Finds the output projection of any model in one traced pass, and records its inputs.

It is the last module that has a row for each token and whose output is as wide as the logits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.matrix import AFFINE, Matrix
from .errors import UnsupportedHeadError
from .observed import with_methods
from .vlm import architecture, check_writes_text, forward, is_vlm

# Methods by which a layer multiplies with its rows: of a linear layer, and of an embedding.
LINEAR = "__call__"
EMBEDDING = "as_linear"

# The rounding of 16 bits, as a share of the largest logit.
MAX_PLAIN_DIFFERENCE = 0.02


@dataclass(frozen=True)
class HeadLocation:
    """Where a model makes its logits.

    Attributes:
        module: The output projection itself.
        path: Its dotted name in the model, such as "lm_head" or "model.embed_tokens".
        method: "__call__" for a linear layer, "as_linear" for a tied embedding.
        hidden_dtype: The dtype of its input states.
    """

    module: nn.Module
    path: str
    method: str
    hidden_dtype: mx.Dtype = mx.float32

    @property
    def tied(self) -> bool:
        """Whether the embedding makes them."""
        return self.method == EMBEDDING

    def rows(self) -> Matrix:
        """The head's rows (V, D), as they are stored."""
        module = self.module
        rows = Matrix(module["weight"], bias=module.get("bias"))
        if "scales" not in module:
            return rows
        return replace(
            rows,
            scales=module["scales"],
            biases=module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=getattr(module, "mode", AFFINE),
        )


def find_head(model: nn.Module) -> HeadLocation:
    """Finds a model's output projection by tracing one forward pass.

    Args:
        model: A model of mlx-lm or mlx-vlm.

    Returns:
        Where the model makes its logits.

    Raises:
        UnsupportedHeadError: If no module's output is the logits, or the model does not run.
    """
    check_writes_text(model)
    vocab_size, wide = _trace(model)
    locations = [location for location in wide if len(location.module["weight"]) == vocab_size]
    heads = [location.module for location in locations]
    head = None
    if heads:
        head = heads[-1]
    _check_adapters(model, head, vocab_size)
    name = architecture(model)
    library = _library(model)
    if head is None:
        raise UnsupportedHeadError(
            f"The output projection of this {name!r} model cannot be intercepted (its {vocab_size} "
            f"logits come from no layer of its own): use it with {library}, without FlashHead."
        )
    if sum(other is head for other in heads) > 1:
        raise UnsupportedHeadError(
            f"This {name!r} model uses its output projection more than once per token, which "
            f"FlashHead does not support: use it with {library}, without FlashHead."
        )
    return replace(locations[-1], path=_path_of(model, head))


def _trace(model: nn.Module) -> tuple[int, list[HeadLocation]]:
    """The width of a model's logits, and the layers that give a number for each of their rows.

    They are in the order of their calls for a token, and without their paths.
    """
    locations: list[HeadLocation] = []

    def record(module: nn.Module, method: str, args: tuple[Any, ...], output: Any) -> None:
        if not args:
            return
        hidden = args[0]
        if not (isinstance(hidden, mx.array) and isinstance(output, mx.array)):
            return
        as_wide = output.shape[-1] == len(module["weight"])
        if as_wide and mx.issubdtype(hidden.dtype, mx.floating):
            locations.append(HeadLocation(module, "", method, hidden.dtype))

    with_rows = [each for each in model.modules() if getattr(each.get("weight"), "ndim", 0) == 2]
    try:
        with _observed(with_rows, record):
            logits = forward(model, mx.array([[0]]))
    # A model's code may raise any type.
    except Exception as error:
        check_writes_text(model, runs=False)
        raise UnsupportedHeadError(
            f"{_library(model)}'s code of this {architecture(model)!r} model fails on a token by "
            f"itself ({type(error).__name__}: {error}), so it cannot be served with FlashHead "
            "either."
        ) from error
    return logits.shape[-1], locations


def _check_adapters(model: nn.Module, head: nn.Module | None, vocab_size: int) -> None:
    """Raises an UnsupportedHeadError if the head carries a LoRA adapter."""
    for path, module in model.named_modules():
        if not {"lora_a", "lora_b"} <= module.keys():
            continue
        holds_head = head is not None and any(part is head for part in module.values())
        # DoRA multiplies the rows itself.
        if holds_head or module.lora_b.shape[-1] == vocab_size:
            raise UnsupportedHeadError(
                f"The output projection {path!r} carries a LoRA adapter, which must be fused "
                "first: run mlx_lm.fuse, then use the fused model."
            )


def _library(model: nn.Module) -> str:
    if is_vlm(model):
        return "mlx-vlm"
    return "mlx-lm"


def _path_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted name of a module in its model."""
    return next(path for path, other in model.named_modules() if other is module)


def find_embedding(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Finds the layer that embeds a model's tokens, and the module that holds it.

    Args:
        model: A model of mlx-lm.

    Raises:
        UnsupportedHeadError: If there is none.
    """
    found: list[nn.Module] = []

    def record(module: nn.Module, method: str, args: tuple[Any, ...], output: Any) -> None:
        if method == LINEAR and mx.issubdtype(args[0].dtype, mx.integer):
            found.append(module)

    embeddings = [each for each in model.modules() if hasattr(type(each), EMBEDDING)]
    with _observed(embeddings, record):
        forward(model, mx.array([[0]]))
    for holder in model.modules():
        if found and any(part is found[0] for part in dict.values(holder)):
            return found[0], holder
    raise UnsupportedHeadError(f"This {architecture(model)!r} model embeds tokens in no layer.")


def check_plain_product(location: HeadLocation) -> None:
    """Checks on a random state that a layer multiplies by its rows.

    Args:
        location: The layer.

    Raises:
        UnsupportedHeadError: If it is sharded, rotated or otherwise special.
    """
    rows = location.rows()
    hidden = mx.random.normal((1, rows.hidden_size), key=mx.random.key(0))
    hidden = hidden.astype(location.hidden_dtype)
    expected = rows.matmul(hidden)
    actual = getattr(location.module, location.method)(hidden)
    is_plain = expected.shape == actual.shape
    if is_plain:
        # A special layer differs by the size of its logits.
        allowed = MAX_PLAIN_DIFFERENCE * mx.max(mx.abs(expected))
        is_near = mx.abs(expected - actual) <= allowed
        is_plain = bool(is_near.all())
    if not is_plain:
        raise UnsupportedHeadError(
            f"The output projection {location.path!r} ({type(location.module).__name__}) is not a "
            "plain product with its rows, which FlashHead needs: use the model without FlashHead."
        )


@contextmanager
def recorded_hidden(location: HeadLocation) -> Iterator[list[mx.array]]:
    """Within the block, records what enters a head.

    Args:
        location: The head.

    Yields:
        A list to which every array (B, L, D) is added, unevaluated.
    """
    states: list[mx.array] = []
    with recorded_inputs([location.module], location.method, states):
        yield states


def recorded_inputs(
    modules: Iterable[nn.Module], method: str, states: list[mx.array]
) -> AbstractContextManager[None]:
    """A block in which what enters some layers is added to ``states``, unevaluated.

    Args:
        modules: The layers.
        method: The method by which they multiply, as of :class:`HeadLocation`.
        states: Gets an array (B, L, D) for each call.
    """

    def record(module: nn.Module, name: str, args: tuple[Any, ...], output: Any) -> None:
        if name == method:
            states.append(args[0])

    return _observed(modules, record)


@contextmanager
def _observed(modules: Iterable[nn.Module], record: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calls of the head-like methods of layers are passed to ``record``."""

    def observing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            record(self, name, args, output)
            return output

        return call

    def methods(cls: type) -> dict[str, Callable[..., Any]]:
        names = [name for name in (LINEAR, EMBEDDING) if hasattr(cls, name)]
        return {name: observing(name, getattr(cls, name)) for name in names}

    with with_methods(modules, methods):
        yield
