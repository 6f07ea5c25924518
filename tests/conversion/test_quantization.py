"""Bits of the body and of the head, as mlx-lm then loads them."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save

from mlx_flashhead.conversion.quantization import HEAD_BITS, BodyRecipe, set_bits
from mlx_flashhead.models.locate import find_head
from model_folders import write_model

PROMPT = mx.array([[5, 17, 3, 99]])
AFFINE_4 = BodyRecipe(None, 4, "affine", None)


def recipe(**kwargs):
    return BodyRecipe(
        **{"group_size": None, "bits": None, "mode": "affine", "predicate": None} | kwargs
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random llamas, by whether the head is tied."""
    root = tmp_path_factory.mktemp("models")
    return {tied: write_model(root / str(tied), tied=tied) for tied in (True, False)}


@pytest.fixture
def load(folders):
    """Loads a fresh copy: model, tokenizer, configuration, path of the head."""

    def load(tied=False, path=None):
        path = path or folders[tied]
        model, tokenizer, config = mlx_lm.load(str(path), lazy=True, return_config=True)
        return model, tokenizer, config, find_head(model).path

    return load


def bits_of(module):
    return module.bits if "scales" in module else 16


def linear_bits(model, head_path):
    """Bits of all layers but the head that can be quantized."""
    return {
        bits_of(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding)
        and path != head_path
    }


def head_weight(model):
    return np.array(find_head(model).rows().dequantized())


def round_trip(folder, source, model, tokenizer, config):
    """What mlx-lm loads after saving."""
    save(folder, source, model, tokenizer, config, donate_model=False)
    return mlx_lm.load(str(folder), return_config=True)


@pytest.mark.parametrize("head_bits", [None, *HEAD_BITS])
@pytest.mark.parametrize("body", [None, AFFINE_4, recipe(bits=8, group_size=32)])
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_body_have_their_own_bits(tmp_path, load, folders, tied, body, head_bits):
    model, tokenizer, config, head_path = load(tied)
    dense = head_weight(model)
    model, config = set_bits(model, config, head_path, body, head_bits)
    body_bits = 16 if body is None else body.bits
    expected_bits = head_bits or body_bits
    location = find_head(model)
    assert location.path == head_path
    assert bits_of(location.module) == expected_bits
    assert linear_bits(model, head_path) == {body_bits}
    # the values: what MLX itself makes of the dense rows
    form = {"group_size": (body and body.group_size) or 64, "bits": expected_bits}
    expected = dense
    if expected_bits < 16:
        expected = np.array(mx.dequantize(*mx.quantize(mx.array(dense), **form), **form))
    np.testing.assert_array_equal(head_weight(model), expected)
    # mlx-lm makes the same of what was saved
    loaded, _, loaded_config = round_trip(tmp_path, folders[tied], model, tokenizer, config)
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, loaded))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert bits_of(find_head(loaded).module) == expected_bits
    np.testing.assert_array_equal(np.array(model(PROMPT)), np.array(loaded(PROMPT)))
    assert ("quantization" in loaded_config) == (body is not None or head_bits in (4, 8))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("body_bits", [4, 8])
def test_quantized_checkpoints(tmp_path, load, folders, tied, body_bits):
    """A head may become coarser than it is stored, never finer; the body stays."""
    model, tokenizer, config, head_path = load(tied)
    model, config = set_bits(model, config, head_path, recipe(bits=body_bits), None)
    source = tmp_path / "quantized"
    save(source, folders[tied], model, tokenizer, config, donate_model=False)

    for head_bits in HEAD_BITS:
        model, tokenizer, config, head_path = load(path=source)
        stored = head_weight(model)
        if head_bits > body_bits:
            with pytest.raises(
                ValueError, match=f"`head_bits` {head_bits} is more than the {body_bits}"
            ):
                set_bits(model, config, head_path, None, head_bits)
            continue
        model, config = set_bits(model, config, head_path, None, head_bits)
        loaded, _, _ = round_trip(tmp_path / str(head_bits), source, model, tokenizer, config)
        form = {"group_size": 64, "bits": head_bits}
        expected = np.array(mx.dequantize(*mx.quantize(mx.array(stored), **form), **form))
        if head_bits == body_bits:
            expected = stored
        np.testing.assert_array_equal(head_weight(loaded), expected)
        assert linear_bits(loaded, head_path) == {body_bits}
        assert bits_of(find_head(loaded).module) == head_bits
        np.testing.assert_array_equal(np.array(model(PROMPT)), np.array(loaded(PROMPT)))


@pytest.mark.parametrize(
    ("body", "head_bits", "form", "linear"),
    [
        ({"mode": "mxfp4"}, None, ("mxfp4", 4), {4}),
        ({"mode": "nvfp4"}, 8, ("affine", 8), {4}),
        ({"mode": "mxfp8"}, 16, ("affine", 0), {8}),
        ({"predicate": "mixed_4_6"}, None, ("affine", 6), {4, 6}),
        ({"predicate": "mixed_4_6"}, 16, ("affine", 0), {4, 6}),
        ({"bits": 8, "predicate": lambda path, module: "mlp" in path}, 4, ("affine", 4), {8, 16}),
    ],
)
def test_other_recipes_of_the_body(tmp_path, load, folders, body, head_bits, form, linear):
    model, tokenizer, config, head_path = load()
    model, config = set_bits(model, config, head_path, recipe(**body), head_bits)
    loaded, _, _ = round_trip(tmp_path, folders[False], model, tokenizer, config)
    rows = find_head(loaded).rows()
    assert (rows.mode, rows.bits) == form
    assert linear_bits(loaded, head_path) == linear
    np.testing.assert_array_equal(np.array(model(PROMPT)), np.array(loaded(PROMPT)))


@pytest.mark.parametrize(
    ("hidden_size", "body", "head_bits", "group_size"),
    [
        (96, None, 8, 32),
        (96, None, 4, 32),
        (96, recipe(bits=4, group_size=32), 8, 32),
        (128, None, 8, 64),
    ],
)
def test_group_that_fits_the_head(tmp_path, load, hidden_size, body, head_bits, group_size):
    source = write_model(tmp_path / "source", tied=False, hidden_size=hidden_size)
    model, tokenizer, config, head_path = load(path=source)
    model, config = set_bits(model, config, head_path, body, head_bits)
    loaded, _, _ = round_trip(tmp_path / "saved", source, model, tokenizer, config)
    rows = find_head(loaded).rows()
    assert (rows.bits, rows.group_size) == (head_bits, group_size)
    np.testing.assert_array_equal(np.array(model(PROMPT)), np.array(loaded(PROMPT)))


@pytest.mark.parametrize(
    ("hidden_size", "body", "head_bits", "sentence"),
    [
        (72, None, 8, r"width 72 is not a multiple of a quantization group \(64 or 32\)"),
        (96, recipe(bits=4, group_size=64), 8, r"width 96 is not a multiple .* \(64\)"),
        (
            96,
            AFFINE_4,
            8,
            "not a multiple of the body's quantization group, so mlx-lm leaves it out",
        ),
        (64, recipe(mode="mxfp4", predicate="mixed_4_6"), None, "need the affine `q_mode`"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, load, hidden_size, body, head_bits, sentence):
    source = write_model(tmp_path / "source", tied=False, hidden_size=hidden_size)
    model, _, config, head_path = load(path=source)
    with pytest.raises(ValueError, match=sentence) as error:
        set_bits(model, config, head_path, body, head_bits)
    assert "\n" not in str(error.value)


def test_prints_nothing(load, capsys):
    model, _, config, head_path = load()
    set_bits(model, config, head_path, AFFINE_4, 8)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
