"""The bits of a model's body, and those of its head.

FlashHead reads few rows per token, so a finer head costs little. Its precision is chosen apart from
the body's.
"""

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..common.arguments import check, one_of
from ..head.formats import AFFINE, AFFINE_BITS, FORMATS, affine_group
from ..models.compat.convert import mixed_quant_predicate_builder
from ..models.compat.utils import dequantize_model, quantize_model

HEAD_BITS = (*AFFINE_BITS, 16)  # 16: floats


@dataclass(frozen=True)
class BodyRecipe:
    """The quantization of the body, in the terms of ``mlx_lm.convert``."""

    group_size: int | None  # None: the mode's usual number, as for the bits
    bits: int | None
    mode: str
    predicate: Callable | str | None


def check_form(mode: str, bits: int | None, group_size: int | None) -> None:
    """Makes sure that MLX can quantize to a form; otherwise mlx-lm would leave weights as they are.

    Raises:
        ValueError: If there is no such form, with those there are.
    """
    of_mode = [one for one in FORMATS if one.mode == mode]
    if bits is not None:
        check("q_bits", bits, one_of(*sorted({one.bits for one in of_mode})))
    if group_size is not None:
        groups = {size for one in of_mode for size in one.group_sizes}
        check("q_group_size", group_size, one_of(*sorted(groups)))


def body_label(body: BodyRecipe | None, config: dict) -> str | None:
    """The precision of the body in models' names, by the configuration from `set_bits`."""
    if body is None:
        return None
    if isinstance(body.predicate, str):
        return body.predicate
    return f"{config['quantization']['bits']}bit" if body.mode == AFFINE else body.mode


def set_bits(
    model: nn.Module,
    config: dict,
    head_path: str,
    body: BodyRecipe | None,
    head_bits: int | None,
) -> tuple[nn.Module, dict]:
    """Quantizes the body by its recipe and the head to its own bits.

    Args:
        body: The recipe; None leaves the body as it is.
        head_bits: 4, 8 or 16 (not quantized); None treats the head as a part of the body.

    Returns:
        The model and a configuration that records the bits.

    Raises:
        ValueError: If the head has fewer bits than ``head_bits``, or its width does not fit a
            group.
    """
    head = dict(model.named_modules())[head_path]
    stored_bits = head.bits if "scales" in head else 16
    if body is None and head_bits in (None, stored_bits):
        return model, config
    if head_bits is not None and head_bits > stored_bits:
        raise ValueError(
            f"`head_bits` {head_bits} is more than the {stored_bits} bits that this model's head "
            "has: convert from a checkpoint with a finer head, or leave the option out."
        )
    if head_bits is not None and head_bits < stored_bits < 16:
        head = dequantize_model(nn.Sequential(head)).layers[0]
        model.update_modules(tree_unflatten([(head_path, head)]))
    head_group = body.group_size if body and body.mode == AFFINE else None
    if head_bits in AFFINE_BITS and head_bits < stored_bits:
        head_group = _group_size(head.weight.shape[-1], head_group)
    of_body = _body_predicate(model, body)

    def predicate(path, module):
        if path != head_path or head_bits is None:
            return of_body(path, module)
        return head_bits < 16 and {"group_size": head_group, "bits": head_bits, "mode": AFFINE}

    with redirect_stdout(StringIO()):  # mlx-lm prints a line of its own
        model, config = quantize_model(
            model,
            config,
            body.group_size if body else head_group,
            body.bits if body else head_bits,
            mode=body.mode if body else AFFINE,
            quant_predicate=predicate,
        )
    head = dict(model.named_modules())[head_path]
    if head_bits is not None and head_bits != (head.bits if "scales" in head else 16):
        raise ValueError(
            "The head's width is not a multiple of the body's quantization group, so mlx-lm leaves "
            "it out: choose a smaller `q_group_size`, or leave `head_bits` out."
        )
    return model, config


def _body_predicate(model: nn.Module, body: BodyRecipe | None):
    if body is None:
        return lambda path, module: False
    if not isinstance(body.predicate, str):
        usual = getattr(model, "quant_predicate", None) or (lambda path, module: True)
        return body.predicate or usual
    if body.mode != AFFINE:
        raise ValueError("Mixed-bit recipes (`quant_predicate`) need the affine `q_mode`.")
    return mixed_quant_predicate_builder(body.predicate, model, body.group_size or 64)


def _group_size(width: int, asked: int | None) -> int:
    group_size = affine_group(width) if asked is None else asked
    if group_size is not None and width % group_size == 0:
        return group_size
    raise ValueError(
        f"The head's width {width} is not a multiple of a quantization group "
        f"({asked or '64 or 32'}): leave `head_bits` out."
    )
