"""The precision of a converted model: the dtype of its floats, and the bits of body and head."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten

from ..head.matrix import AFFINE, Matrix, affine_group
from ..models.compat import mlx_lm
from ..models.locate import HeadLocation
from .options import DTYPES, ConvertOptions

DTYPE_LABELS = {mx.bfloat16: "bf16", mx.float16: "fp16", mx.float32: "fp32"}
# The head of a quantized model has so many bits: docs/converting.md has what 4 bits cost.
DEFAULT_HEAD_BITS = 8
# `head_bits` calls floats so.
FLOAT_BITS = 16

# The usual bits and group sizes of mlx-lm's modes.
DEFAULT_BITS = {AFFINE: 4, "mxfp4": 4, "nvfp4": 4, "mxfp8": 8}
DEFAULT_GROUPS = {AFFINE: 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


class _Form(NamedTuple):
    """How rows are quantized.

    Attributes:
        group_size: Columns that share a scale; None where the width is a multiple of none.
        bits: Of a value; None where a conversion treats the head as any other layer.
        mode: mlx-lm's.
    """

    group_size: int | None
    bits: int | None
    mode: str


def set_dtype(
    model: nn.Module, config: dict[str, Any], source: Path, options: ConvertOptions
) -> None:
    """Gives a model its final dtype, and removes its quantization if that is to go.

    The dtype is that of ``mlx_lm.convert``: weights that MLX has stored keep theirs. Nothing is
    evaluated.

    Args:
        model: The model, which changes.
        config: Its configuration, which changes too.
        source: The model's folder.
        options: The conversion's options.
    """
    dtype_name = options.dtype or _declared_dtype(config, source)
    if dtype_name is not None:
        dtype = getattr(mx, dtype_name)
        may_cast = getattr(model, "cast_predicate", lambda _: True)

        def as_dtype(name: str, array: mx.array) -> mx.array:
            if mx.issubdtype(array.dtype, mx.floating) and may_cast(name):
                return array.astype(dtype)
            return array

        model.update(tree_map_with_path(as_dtype, model.parameters()))
    if options.dequantize:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        mlx_lm.dequantize_model(model)


def _declared_dtype(config: dict[str, Any], source: Path) -> str | None:
    """The dtype that a configuration names, if it does, and if MLX has not stored the weights."""
    for file in source.glob("model*.safetensors"):
        _, header = cast(Any, mx.load(str(file), return_metadata=True))
        if header.get("format") == "mlx":
            return None
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name not in DTYPES:
        return None
    return name


def precision_label(options: ConvertOptions, config: dict[str, Any], rows: Matrix) -> str:
    """The precision as models' names have it.

    Args:
        options: The conversion's options.
        config: The configuration of the converted model.
        rows: The rows of its head.

    Returns:
        "4bit", "mxfp4", "bf16", or a recipe of mixed bits.
    """
    if isinstance(options.quant_predicate, str):
        return options.quant_predicate
    quantization = rows.quantization
    if options.quantize:
        quantization = config["quantization"] | {"mode": options.q_mode}
    if not quantization:
        return DTYPE_LABELS[rows.weight.dtype]
    if quantization["mode"] == AFFINE:
        return f"{quantization['bits']}bit"
    return quantization["mode"]


def set_bits(
    model: nn.Module,
    config: dict[str, Any],
    location: HeadLocation,
    options: ConvertOptions,
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantizes the body and the head, each to bits of its own.

    The body is quantized by its recipe, if it has one. The head gets the bits that are chosen, or 8
    in a model that is quantized, since FlashHead reads few of its rows.

    Args:
        model: The model, which changes.
        config: Its configuration.
        location: Its head.
        options: The conversion's options.

    Returns:
        The model and its configuration.

    Raises:
        ValueError: If the head has fewer bits than chosen, or its width fits no group.
    """
    rows = location.rows()
    body_group = options.q_group_size or DEFAULT_GROUPS[options.q_mode]
    body_bits = options.q_bits or DEFAULT_BITS[options.q_mode]
    body = _Form(body_group, body_bits, options.q_mode)
    bits = head_bits(rows, options)
    stored_bits = rows.bits or FLOAT_BITS
    if not options.quantize and bits in (None, stored_bits):
        return model, config
    head_group = affine_group(rows.hidden_size)
    if options.q_mode == AFFINE and options.q_group_size:
        head_group = options.q_group_size
    head = _Form(head_group, bits, AFFINE)
    if bits is not None:
        group_size = head_group
        if options.quantize and rows.hidden_size % body_group:
            group_size = body_group
        _check_head_bits(bits, rows, group_size)
        if bits < stored_bits:
            _restore_floats(model, location)
    recipe = _recipe(model, options, body_group)
    # A head that shares the form of the body is not stored by itself.
    has_own_form = bits is not None and not (options.quantize and recipe is None and head == body)

    def quantization(path: str, module: nn.Module) -> Any:
        """How mlx-lm is to quantize a layer; False keeps its floats."""
        if path == location.path and has_own_form:
            if bits == FLOAT_BITS:
                return False
            return head._asdict()
        return options.quantize and (recipe is None or recipe(path, module))

    form = head
    if options.quantize:
        form = body
    # mlx-lm prints a line of its own.
    with redirect_stdout(StringIO()):
        return mlx_lm.quantize_model(
            model,
            config,
            form.group_size,
            form.bits,
            mode=options.q_mode,
            quant_predicate=quantization,
        )


def _recipe(model: nn.Module, options: ConvertOptions, group_size: int) -> Any:
    """A function of mlx-lm's that says how layers are quantized; None if all are in one way."""
    recipe: Any = options.quant_predicate or getattr(model, "quant_predicate", None)
    if isinstance(recipe, str):
        return mlx_lm.mixed_quant_predicate_builder(recipe, model, group_size)
    return recipe


def _restore_floats(model: nn.Module, location: HeadLocation) -> None:
    """Gives a model's head floats, if it is quantized."""
    if location.rows().quantized:
        dense = mlx_lm.dequantize_model(nn.Sequential(location.module)).layers[0]
        model.update_modules(tree_unflatten([(location.path, dense)]))


def _check_head_bits(bits: int, rows: Matrix, group_size: int | None) -> None:
    """Checks that a head can have the bits that are chosen.

    Args:
        bits: The bits.
        rows: The head's rows (V, D).
        group_size: Columns that share a scale; None if D is a multiple of none of them.

    Raises:
        ValueError: If it has fewer bits, or its width fits no group.
    """
    stored_bits = rows.bits or FLOAT_BITS
    if bits > stored_bits:
        raise ValueError(
            f"`head_bits` {bits} is more than the {stored_bits} bits that this model's head "
            "has: convert from a checkpoint with a finer head, or leave the option out."
        )
    if bits < stored_bits and (group_size is None or rows.hidden_size % group_size):
        raise ValueError(
            f"The head's width {rows.hidden_size} is not a multiple of the quantization group "
            f"({group_size or '64 or 32'}): leave `head_bits` out."
        )


def head_bits(rows: Matrix, options: ConvertOptions) -> int | None:
    """The bits that a conversion gives the head; None if it treats the head as any other layer.

    Args:
        rows: The head's rows (V, D).
        options: The conversion's options.
    """
    bits = options.head_bits
    if options.fine_head:
        bits = None
    body_group = options.q_group_size or DEFAULT_GROUPS[options.q_mode]
    # A function chooses for the head too, and mlx-lm leaves a width that fits no group as it is.
    by_function = callable(options.quant_predicate)
    fits = rows.hidden_size % body_group == 0
    if options.quantize and not bits and not by_function and not rows.quantized and fits:
        bits = DEFAULT_HEAD_BITS
    # Modes other than affine have one number of bits.
    if options.q_mode != AFFINE and bits == DEFAULT_BITS[options.q_mode]:
        return None
    return bits
