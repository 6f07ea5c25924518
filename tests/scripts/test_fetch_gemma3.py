"""Gemma's folder: dequantization, names and tokenizer, on tiny files."""

import itertools

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from tokenizers import Tokenizer

from fetch_model import GEMMA_NAMES, MODELS, hugging_face_name, read_gemma3, write_folder

WORDS = ["▁", "a", "b", "c", "▁a", "bc", "▁abc", "abc", "ab", "\n\n", "<html>"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
KINDS = [3] * 4 + [6] * 256 + [1] * 9 + [4, 4]
# of the words: bc before ▁a, the longer ones later, and ab last of all
SCORES = [0.0] * 260 + [-50, -51, -52, -53, -2, -1, -4, -3, -5, -1000, -1000]
VOCAB_SIZE = len(TOKENS)

# at Hugging Face, in GGUF
SIZES = (
    ("hidden_size", "embedding_length", 64),
    ("intermediate_size", "feed_forward_length", 96),
    ("num_hidden_layers", "block_count", 6),
    ("num_attention_heads", "attention.head_count", 2),
    ("num_key_value_heads", "attention.head_count_kv", 1),
    ("head_dim", "attention.key_length", 32),
    ("sliding_window", "attention.sliding_window", 16),
    ("max_position_embeddings", "context_length", 128),
)


@pytest.fixture(scope="module")
def model():
    """A random model of the architecture, whose norms are no ones."""
    arguments = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        vocab_size=VOCAB_SIZE,
        query_pre_attn_scalar=32,
        **{name: size for name, _, size in SIZES},
    )
    model = gemma3_text.Model(arguments)
    model.sanitize({})
    rng = np.random.default_rng(0)
    weights = [
        (name, mx.array(rng.normal(scale=0.2, size=array.shape).astype(np.float32)))
        for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    return model


@pytest.fixture(scope="module")
def gguf(model, tmp_path_factory):
    """The same model as llama.cpp stores it: 8-bit embedding, norms one higher."""
    path = tmp_path_factory.mktemp("gguf") / MODELS["gemma3"].gguf_name
    writer = GGUFWriter(path, "gemma3")
    for _, name, size in SIZES:
        writer.add_uint32(f"gemma3.{name}", size)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma3.rope.freq_base", 1e6)
    writer.add_token_list(TOKENS)
    writer.add_token_scores([float(score) for score in SCORES])
    writer.add_token_types(KINDS)
    stored = [f"blk.{layer}.{module}.weight" for layer in range(6) for module in GEMMA_NAMES]
    names = {hugging_face_name(name, GEMMA_NAMES): name for name in stored}
    names["model.norm.weight"] = "output_norm.weight"
    for name, array in tree_flatten(model.parameters()):
        weight = np.array(array)
        if name == "model.embed_tokens.weight":
            form = GGMLQuantizationType.Q8_0
            writer.add_tensor("token_embd.weight", quantize(weight, form), raw_dtype=form)
        else:
            writer.add_tensor(names[name], weight + (1 if "norm" in name else 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder, gguf.name, read_gemma3(gguf), "float16")
    return folder


def test_same_model_as_before_it_was_stored(model, folder):
    loaded, _, config = mlx_lm.load(str(folder), return_config=True)
    stored = dict(tree_flatten(loaded.parameters()))
    for name, array in tree_flatten(model.parameters()):
        # eight bits a weight: half a step of a block's largest weight over 127
        tolerance = 0.004 if name == "model.embed_tokens.weight" else 1e-3
        assert stored[name].dtype == mx.float16
        np.testing.assert_allclose(stored[name], array, atol=tolerance)
    assert config["_name_or_path"] == MODELS["gemma3"].gguf_name
    token_ids = mx.array([list(range(2, 42))])
    logits = model(token_ids)
    np.testing.assert_allclose(loaded(token_ids), logits, atol=0.05 * mx.abs(logits).max().item())


def test_tokens_of_a_text(folder):
    _, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.eos_token_ids == {1}
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 0)
    text = "c abcé\n\n<html>a<eos>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    text = f"  a {text} 東京 🙂\0"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokens == [
        *("<bos>", "c", "▁abc", "<0xC3>", "<0xA9>", "\n\n", "<html>", "a", "<eos>")
    ]  # fmt: skip


def test_best_scored_pieces_win(folder):
    """As in the model's own tokenizer, which always merges the neighbours of the best score."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    score = dict(zip(TOKENS, SCORES, strict=True))
    for length in range(1, 7):
        for letters in itertools.product("▁abc", repeat=length):
            pieces = list(letters)
            while True:
                found = [
                    (score[left + right], -i)
                    for i, (left, right) in enumerate(itertools.pairwise(pieces))
                    if left + right in score
                ]
                if not found:
                    break
                i = -max(found)[1]
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            text = "".join(letters).replace("▁", " ")
            assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces


def test_the_four_norms_of_a_layer():
    """All have one shape: nothing else would tell that two are swapped."""
    for stored, expected in (
        ("attn_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ):
        found = hugging_face_name(f"blk.3.{stored}.weight", GEMMA_NAMES)
        assert found == f"model.layers.3.{expected}.weight"
