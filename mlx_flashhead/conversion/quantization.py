"""The bits of a model's body, and those of its head, which may be finer: FlashHead reads few rows.
What the head's bits cost in quality is measured against the unquantized head."""

import timeit
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..head.matrix import AFFINE, DEFAULT_GROUP, Matrix, affine_group
from ..models.compat.mlx_lm import dequantize_model, mixed_quant_predicate_builder, quantize_model
from . import Step, Steps
from .options import ConvertOptions

DTYPE_LABELS = {mx.bfloat16: "bf16", mx.float16: "fp16", mx.float32: "fp32"}
DEFAULT_HEAD_BITS = 8  # of a quantized model: docs/converting.md has what 4 bits cost
DEFAULT_BITS, DEFAULT_GROUPS = 4, {"affine": DEFAULT_GROUP, "nvfp4": 16}  # mlx-lm's, else 32

COMPARED_BITS = 4  # what other conversions give the head
COMPARED_POSITIONS, COMPARED_AT_ONCE, TIMED = 512, 32, 5


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


def chosen_head_bits(options: ConvertOptions, rows: Matrix) -> int | None:
    """The head's own bits: as chosen, or 8 in a model that is quantized; None: as the body's."""
    group_size = options.q_group_size or DEFAULT_GROUPS.get(options.q_mode, 32)
    by_default = (
        options.quantize
        and not callable(options.quant_predicate)  # which chooses for the head too
        and not rows.quantized
        and rows.hidden_size % group_size == 0  # else mlx-lm leaves the head as it is
    )
    bits = DEFAULT_HEAD_BITS if options.head_bits is None and by_default else options.head_bits
    # the modes of other formats have one number of bits
    same = options.q_mode != AFFINE and bits == int(options.q_mode[-1])
    return None if same else bits


def set_bits(
    model: nn.Module, config: dict, head_path: str, options: ConvertOptions, bits: int | None
) -> tuple[nn.Module, dict]:
    """Quantizes the body by its recipe, if it has one, and the head to its own ``bits``; ValueError
    if it has fewer, or its width fits no group."""
    quantizes, group_size = options.quantize, options.q_group_size
    head = dict(model.named_modules())[head_path]
    stored_bits = _bits_of(head)
    if not quantizes and bits in (None, stored_bits):
        return model, config
    affine = options.q_mode == AFFINE
    head_group = group_size if affine else None
    if bits is not None:
        if bits > stored_bits:
            raise ValueError(
                f"`head_bits` {bits} is more than the {stored_bits} bits that this model's "
                "head has: convert from a checkpoint with a finer head, or leave the option out."
            )
        if bits < stored_bits < 16:
            head = dequantize_model(nn.Sequential(head)).layers[0]
            model.update_modules(tree_unflatten([(head_path, head)]))
        if bits < min(stored_bits, 16):
            width = head.weight.shape[-1]
            head_group = affine_group(width) if head_group is None else head_group
            if head_group is None or width % head_group:
                raise ValueError(
                    f"The head's width {width} is not a multiple of a quantization group "
                    f"({head_group or '64 or 32'}): leave `head_bits` out."
                )
    body: Any = options.quant_predicate or getattr(model, "quant_predicate", None)
    if isinstance(body, str):
        if not affine:
            raise ValueError("Mixed-bit recipes (`quant_predicate`) need the affine `q_mode`.")
        body = mixed_quant_predicate_builder(body, model, group_size or DEFAULT_GROUP)
    body_form = (options.q_bits or DEFAULT_BITS, group_size or DEFAULT_GROUP)
    same = affine and body is None and (bits, head_group) == body_form

    def predicate(path: str, module: nn.Module) -> Any:
        if path != head_path or bits is None or (quantizes and same):
            return quantizes and (body is None or body(path, module))
        return bits < 16 and {"group_size": head_group, "bits": bits, "mode": AFFINE}

    with redirect_stdout(StringIO()):  # mlx-lm prints a line of its own
        model, config = quantize_model(
            model,
            config,
            group_size if quantizes else head_group,
            options.q_bits if quantizes else bits,
            mode=options.q_mode,
            quant_predicate=predicate,
        )
    if bits is not None and bits != _bits_of(dict(model.named_modules())[head_path]):
        raise ValueError(
            "The head's width is not a multiple of the body's quantization group, so mlx-lm leaves "
            "it out: choose a smaller `q_group_size`, or leave `head_bits` out."
        )
    return model, config


def compare_bits(
    original: Matrix,
    rows: Matrix,
    states: np.ndarray,
    next_ids: np.ndarray,
    expected_share: Callable[[Matrix], float],
) -> Steps[dict[str, Any]]:
    """Compares a head at 4 bits and its ``rows`` with the ``original``, unquantized one.

    Args:
        states: Held-out states (N, D) float32; some of them are used.
        next_ids: The tokens (N,) after them.
        expected_share: Expected bytes of verified decoding with such rows, of the dense head's.

    Returns:
        JSON-ready: ``positions``, and ``rows`` with ``bits``, ``kl`` in nats, ``agreement``,
        ``perplexity``, ``bytes``, ``dense_ms`` and, estimated from it, ``flash_head_ms``.
    """
    group = rows.group_size if rows.mode == AFFINE else affine_group(original.hidden_size)
    heads = {rows.bits: rows, 8 * original.weight.dtype.size: original}
    if COMPARED_BITS not in heads and group:
        heads[COMPARED_BITS] = original.quantize(bits=COMPARED_BITS, group_size=group)
    chosen = np.linspace(0, len(states) - 1, min(len(states), COMPARED_POSITIONS)).astype(int)
    totals = dict.fromkeys(heads, np.zeros(3))
    for start in range(0, len(chosen), COMPARED_AT_ONCE):
        part = chosen[start : start + COMPARED_AT_ONCE]
        hidden, truth = mx.array(states[part]), mx.array(next_ids[part])[:, None]
        expected = _log_probabilities(original, hidden)
        for bits, head in heads.items():
            actual = _log_probabilities(head, hidden)
            kl = (mx.exp(expected) * (expected - actual)).sum()
            same = (actual.argmax(axis=-1) == expected.argmax(axis=-1)).sum()
            loss = -mx.take_along_axis(actual, truth, axis=-1).sum()
            totals[bits] = totals[bits] + np.array([kl.item(), same.item(), loss.item()])
        yield Step("Comparing bits", start + len(part), len(chosen), "position")
    hidden = mx.array(states[:1]).astype(original.weight.dtype)
    table = []
    for bits, head in sorted(heads.items()):
        kl, same, loss = (totals[bits] / len(chosen)).tolist()
        seconds = min(timeit.repeat(partial(_evaluate, head, hidden), number=1, repeat=TIMED))
        table.append(
            {
                "bits": bits,
                "kl": max(kl, 0.0),
                "agreement": same,
                "perplexity": float(np.exp(loss)),
                "bytes": head.nbytes,
                "dense_ms": 1000 * seconds,
                "flash_head_ms": 1000 * seconds * expected_share(head),
            }
        )
    return {"positions": len(chosen), "rows": table}


def _evaluate(head: Matrix, hidden: mx.array) -> None:
    mx.eval(head.matmul(hidden))


def _log_probabilities(head: Matrix, hidden: mx.array) -> mx.array:
    logits = head.matmul(hidden).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _bits_of(module: Any) -> int:
    return module.bits if "scales" in module else 16
