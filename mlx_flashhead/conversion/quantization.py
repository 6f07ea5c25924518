"""The bits of a model's body, and those of its head, which may be finer: FlashHead reads few
rows."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..head.formats import AFFINE, AFFINE_BITS, affine_group
from ..head.matrix import Matrix
from ..models.compat.mlx_lm import dequantize_model, mixed_quant_predicate_builder, quantize_model
from .options import ConvertOptions

DTYPE_LABELS = {mx.bfloat16: "bf16", mx.float16: "fp16", mx.float32: "fp32"}


def precision_label(options: ConvertOptions, config: dict, rows: Matrix) -> str:
    """The precision as models' names have it: "4bit", "mxfp4", "bf16", a recipe of mixed bits."""
    if isinstance(options.quant_predicate, str):
        return options.quant_predicate
    if not options.quantize and not rows.quantized:
        return DTYPE_LABELS[rows.weight.dtype]
    bits, mode = rows.bits, rows.mode
    if options.quantize:
        bits, mode = config["quantization"]["bits"], options.q_mode
    return f"{bits}bit" if mode == AFFINE else mode


def set_bits(
    model: nn.Module, config: dict, head_path: str, options: ConvertOptions
) -> tuple[nn.Module, dict]:
    """Quantizes the body by its recipe, if it has one, and the head to its own bits; ValueError if
    it has fewer bits, or its width fits no group."""
    head_bits, quantizes = options.head_bits, options.quantize
    head = dict(model.named_modules())[head_path]
    stored_bits = _bits_of(head)
    if not quantizes and head_bits in (None, stored_bits):
        return model, config
    group_size = options.q_group_size
    head_group = group_size if options.q_mode == AFFINE else None
    if head_bits is not None:
        if head_bits > stored_bits:
            raise ValueError(
                f"`head_bits` {head_bits} is more than the {stored_bits} bits that this model's "
                "head has: convert from a checkpoint with a finer head, or leave the option out."
            )
        if head_bits < stored_bits < 16:
            head = dequantize_model(nn.Sequential(head)).layers[0]
            model.update_modules(tree_unflatten([(head_path, head)]))
        if head_bits in AFFINE_BITS and head_bits < stored_bits:
            width = head.weight.shape[-1]
            head_group = affine_group(width) if head_group is None else head_group
            if head_group is None or width % head_group:
                raise ValueError(
                    f"The head's width {width} is not a multiple of a quantization group "
                    f"({head_group or '64 or 32'}): leave `head_bits` out."
                )
    of_body: Any = options.quant_predicate or getattr(model, "quant_predicate", None)
    if isinstance(of_body, str):
        if options.q_mode != AFFINE:
            raise ValueError("Mixed-bit recipes (`quant_predicate`) need the affine `q_mode`.")
        of_body = mixed_quant_predicate_builder(of_body, model, group_size or 64)

    def predicate(path: str, module: nn.Module) -> Any:
        if path != head_path or head_bits is None:
            return quantizes and (of_body is None or of_body(path, module))
        return head_bits < 16 and {"group_size": head_group, "bits": head_bits, "mode": AFFINE}

    with redirect_stdout(StringIO()):  # mlx-lm prints a line of its own
        model, config = quantize_model(
            model,
            config,
            group_size if quantizes else head_group,
            options.q_bits if quantizes else head_bits,
            mode=options.q_mode,
            quant_predicate=predicate,
        )
    if head_bits is not None and head_bits != _bits_of(dict(model.named_modules())[head_path]):
        raise ValueError(
            "The head's width is not a multiple of the body's quantization group, so mlx-lm leaves "
            "it out: choose a smaller `q_group_size`, or leave `head_bits` out."
        )
    return model, config


def _bits_of(module: Any) -> int:
    return module.bits if "scales" in module else 16
