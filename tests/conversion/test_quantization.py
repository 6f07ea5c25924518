"""Bits of the body and of the head, as mlx-lm then loads them."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save

import refusals
from mlx_flashhead.conversion.options import HEAD_BITS, ConvertOptions
from mlx_flashhead.conversion.precision import set_bits
from mlx_flashhead.models.locate import find_head
from model_folders import write_model

PROMPT = mx.array([[5, 17, 3, 99]])
QUANTIZE = {"quantize": True}
MIXED = QUANTIZE | {"quant_predicate": "mixed_4_6"}
OF_MLP = QUANTIZE | {"quant_predicate": lambda path, module: "mlp" in path}
AFFINE_4 = QUANTIZE | {"q_bits": 4}
AFFINE_8 = QUANTIZE | {"q_bits": 8, "q_group_size": 32}


def converted(source, **options):
    """The model of a folder with its new bits, its tokenizer and its configuration."""
    model, tokenizer, config = mlx_lm.load(str(source), lazy=True, return_config=True)
    given = ConvertOptions(str(source), **options)
    model, config = set_bits(model, config, find_head(model), given)
    return model, tokenizer, config


def checked_stored(folder, source, **options):
    """What mlx-lm loads after saving, which is the same model, and its configuration."""
    model, tokenizer, config = converted(source, **options)
    save(folder, source, model, tokenizer, config, donate_model=False)
    loaded, loaded_config = mlx_lm.utils.load_model(folder)
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, loaded))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert mx.array_equal(model(PROMPT), loaded(PROMPT))
    return loaded, loaded_config


def linear_bits(model):
    """Bits of all layers but the head that can be quantized."""
    layers = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding
    head = find_head(model).module
    found = set()
    for module in model.modules():
        if isinstance(module, layers) and module is not head:
            bits = module.bits if "scales" in module else 16
            found.add(bits)
    return found


def head_weight(model):
    return np.array(find_head(model).rows().dequantized())


def rounded(weight, bits, group_size):
    """What MLX itself makes of dense rows."""
    form = {"group_size": group_size, "bits": bits}
    return np.array(mx.dequantize(*mx.quantize(mx.array(weight), **form), **form))


FLOATS = ("affine", 0, 0)
# The form of a head of so many bits.
HEADS = [(bits, ("affine", bits, 64)) for bits in HEAD_BITS if bits < 16]
HEADS += [(bits, FLOATS) for bits in HEAD_BITS if bits >= 16]


@pytest.mark.parametrize(
    ("hidden_size", "tied", "options", "form", "linear"),
    [
        *((64, True, {"head_bits": bits}, form, {16}) for bits, form in HEADS),
        *((64, False, AFFINE_4 | {"head_bits": bits}, form, {4}) for bits, form in HEADS),
        (64, True, {}, FLOATS, {16}),
        (64, False, AFFINE_4, ("affine", 8, 64), {4}),
        (64, False, AFFINE_8, ("affine", 8, 32), {8}),
        (64, True, AFFINE_8 | {"head_bits": 4}, ("affine", 4, 32), {8}),
        (64, True, AFFINE_8 | {"head_bits": 16}, FLOATS, {8}),
        (64, False, QUANTIZE | {"q_mode": "mxfp4"}, ("affine", 8, 64), {4}),
        (64, False, QUANTIZE | {"q_mode": "mxfp4", "head_bits": 4}, ("mxfp4", 4, 32), {4}),
        (64, False, QUANTIZE | {"q_mode": "mxfp8"}, ("mxfp8", 8, 32), {8}),
        # A width that fits no group: mlx-lm leaves all as it is.
        (72, False, QUANTIZE, FLOATS, {16}),
        (64, False, QUANTIZE | {"q_mode": "nvfp4", "head_bits": 8}, ("affine", 8, 64), {4}),
        (64, False, MIXED, ("affine", 8, 64), {4, 6}),
        (64, False, OF_MLP | {"q_bits": 8, "head_bits": 4}, ("affine", 4, 64), {8, 16}),
        # The group fits the head's width.
        (96, False, {"head_bits": 4}, ("affine", 4, 32), {16}),
        (96, False, QUANTIZE | {"q_group_size": 32, "head_bits": 8}, ("affine", 8, 32), {4}),
    ],
)
def test_head_and_body_have_their_own_bits(tmp_path, hidden_size, tied, options, form, linear):
    source = write_model(tmp_path / "source", tied=tied, hidden_size=hidden_size)
    dense = head_weight(mlx_lm.utils.load_model(source)[0])
    model, config = checked_stored(tmp_path / "stored", source, **options)
    rows = find_head(model).rows()
    assert (rows.mode, rows.bits, rows.group_size) == form
    assert linear_bits(model) == linear
    if rows.mode == "affine":
        expected = dense
        if rows.bits:
            expected = rounded(dense, rows.bits, rows.group_size)
        np.testing.assert_array_equal(head_weight(model), expected)
    is_quantized = "quantize" in options or rows.bits > 0
    assert ("quantization" in config) == is_quantized


@pytest.mark.parametrize(("tied", "body_bits"), [(True, 8), (False, 4)])
def test_quantized_checkpoints(tmp_path, tied, body_bits):
    """A head may become coarser than it is stored, never finer; the body stays."""
    source = tmp_path / "quantized"
    dense = write_model(tmp_path / "dense", tied=tied)
    model, _ = checked_stored(source, dense, quantize=True, q_bits=body_bits, head_bits=body_bits)
    before = head_weight(model)
    for head_bits in HEAD_BITS:
        if head_bits > body_bits:
            said = f"`head_bits` {head_bits} is more than the {body_bits}"
            refusals.refused(lambda bits=head_bits: converted(source, head_bits=bits), said)
            continue
        model, _ = checked_stored(tmp_path / str(head_bits), source, head_bits=head_bits)
        if head_bits == body_bits:
            expected = before
        else:
            expected = rounded(before, head_bits, 64)
        np.testing.assert_array_equal(head_weight(model), expected)
        assert linear_bits(model) == {body_bits}
        assert find_head(model).rows().bits == head_bits


@pytest.mark.parametrize(
    ("hidden_size", "body", "sentence"),
    [
        (72, {}, r"width 72 is not a multiple of the quantization group \(64 or 32\)"),
        (96, AFFINE_4 | {"q_group_size": 64}, r"width 96 is not a multiple .* \(64\)"),
        (96, AFFINE_4, r"width 96 is not a multiple .* \(64\)"),
    ],
)
def test_widths_that_fit_no_group(tmp_path, hidden_size, body, sentence):
    source = write_model(tmp_path / "source", tied=False, hidden_size=hidden_size)
    refusals.refused(lambda: converted(source, head_bits=8, **body), sentence)
