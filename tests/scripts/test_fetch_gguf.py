"""The folders of the models: Gemma's and Qwen's of tiny files, SmolLM2's as it is."""

from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, qwen2
from tokenizers import Tokenizer, pre_tokenizers

import gguf_folder
from fetch_model import MODELS
from gguf_folder import (
    GEMMA_NAMES,
    LLAMA_NAMES,
    SIZES,
    hugging_face_name,
    read_weights,
    write_folder,
)

WORDS = ["▁", "a", "b", "c", "▁a", "bc", "▁abc", "abc", "ab", "\n\n", "<html>"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *WORDS]
KINDS = [3] * 4 + [6] * 256 + [1] * 9 + [4, 4]
# Of the words: bc before ▁a, the longer ones later, and ab last of all.
SCORES = [0.0] * 260 + [-50, -51, -52, -53, -2, -1, -4, -3, -5, -1000, -1000]
CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "head_dim": 32}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG |= {"sliding_window": 16, "max_position_embeddings": 128}
# All have one shape: nothing else would tell that two are swapped.
NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def finish(writer):
    """Writes what a file is to hold."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model():
    """A random model of the architecture, whose norms are no ones."""
    options = {"vocab_size": len(TOKENS), "query_pre_attn_scalar": 32, **CONFIG}
    model = gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **options))
    model.sanitize({})
    rng = np.random.default_rng(0)
    for name, array in tree_flatten(model.parameters()):
        weight = mx.array(rng.normal(scale=0.2, size=array.shape).astype(np.float32))
        model.load_weights([(name, weight)], strict=False)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The same model as llama.cpp stores it, in 8-bit embeddings and norms one higher, fetched."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / MODELS["gemma3"].gguf_name
    writer = gguf.GGUFWriter(path, "gemma3")
    further = {"head_dim": "attention.key_length", "sliding_window": "attention.sliding_window"}
    for name, size in CONFIG.items():
        writer.add_uint32(f"gemma3.{(SIZES | further)[name]}", size)
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
            form = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(weight, form)
            writer.add_tensor("token_embd.weight", blocks, raw_dtype=form)
        else:
            if "norm" in name:
                weight = weight + 1
            writer.add_tensor(names[name], weight)
    finish(writer)
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder, path, "float16")
    return folder


def test_a_bar_grows_while_a_large_tensor_is_dequantized(capsys, monkeypatch):
    gguf = pytest.importorskip("gguf")
    form = gguf.GGMLQuantizationType.Q8_0
    weight = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(weight, form)
    tensor = SimpleNamespace(
        name="token_embd.weight", data=blocks, tensor_type=form, n_elements=weight.size
    )
    monkeypatch.setattr(gguf_folder, "ROWS_AT_ONCE", 20)
    moves = []
    monkeypatch.setattr(gguf_folder.tqdm, "update", lambda bar, n: moves.append(n))
    reader = SimpleNamespace(tensors=[tensor])
    weights = read_weights(reader, {"model_type": "llama"}, {}, mx.float32)
    assert moves == [20 * 64, 20 * 64, 10 * 64]
    assert "Dequantizing the weights" in capsys.readouterr().err
    expected = gguf.quants.dequantize(blocks, form)
    assert np.array_equal(np.array(weights["model.embed_tokens.weight"]), expected)


def test_same_model_as_before_it_was_stored(model, folder):
    assert NORMS.items() <= GEMMA_NAMES.items()
    loaded, _, config = mlx_lm.load(str(folder), return_config=True)
    stored = dict(tree_flatten(loaded.parameters()))
    for name, array in tree_flatten(model.parameters()):
        # Eight bits a weight: half a step of a block's largest weight over 127.
        tolerance = 1e-3
        if name == "model.embed_tokens.weight":
            tolerance = 0.004
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
    assert tokens == ["<bos>", "c", "▁abc", "<0xC3>", "<0xA9>", "\n\n", "<html>", "a", "<eos>"]
    text = f"  a {text} 東京 🙂\0"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_best_scored_pieces_win(folder):
    """As in the model's own tokenizer, which always merges the neighbours of the best score."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    by_text = {" abc": "▁abc", " ab": "▁a b", "ab": "ab", "aabc": "a abc", "abbc": "ab bc"}
    for text, pieces in by_text.items():
        assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces.split()


def test_qwen2_has_biases_and_the_rows_of_its_head(tmp_path):
    gguf = pytest.importorskip("gguf")
    sizes = CONFIG | {"vocab_size": 300, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    sizes |= {"num_hidden_layers": 1, "rope_theta": 1e6}
    names = {field: sizes[field] for field in qwen2.ModelArgs.__annotations__ if field in sizes}
    model = qwen2.Model(qwen2.ModelArgs(model_type="qwen2", **names))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, key in SIZES.items():
        if name == "rope_theta":
            write = writer.add_float32
        else:
            write = writer.add_uint32
        write(f"qwen2.{key}", sizes[name])
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_token_list([*letters, *(f"<{i}>" for i in range(43)), "in"])
    writer.add_token_types([1] * 256 + [3] * 42 + [4, 1])
    writer.add_token_merges(["i n"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(257)
    writer.add_pad_token_id(257)
    stored = ["output", "output_norm", *(f"blk.0.{module}" for module in LLAMA_NAMES)]
    stored_names = {hugging_face_name(f"{name}.", LLAMA_NAMES): name for name in stored}
    for name, array in tree_flatten(model.parameters()):
        module, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{stored_names[f'{module}.']}.{kind}", np.array(array))
    writer.add_tensor("token_embd.weight", np.zeros((300, 64), np.float32))
    finish(writer)
    (tmp_path / "model").mkdir()
    write_folder(tmp_path / "model", path, "float32")
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    expected = dict(tree_flatten(model.parameters()))
    for name, array in tree_flatten(loaded.parameters()):
        assert mx.array_equal(array, expected.pop(name)), name
    assert not expected
    text = "don't in 123\n\n  é<3>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {298, 299} < {*tokenizer.encode(f"{text}<42>")}
    assert tokenizer.eos_token_ids == {256}


@pytest.mark.real
def test_smollm2(real_model_folder):
    """Its weights are right, since it says Paris in test_real_model.py."""
    model, tokenizer = mlx_lm.load(str(real_model_folder), lazy=True)
    text = "  café, 東京, e\u0301, 🙂👩‍🚀 \n\n\ttabs\r\n  f'{i:>3}' don't a \u0000 byte"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = [tokenizer.decode([token_id]) for token_id in tokenizer.encode("x=31415 in 24")]
    assert tokens == ["x", "=", "3", "1", "4", "1", "5", " in", " ", "2", "4"]
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|endoftext|>")
    assert ids == [1, *tokenizer.encode("user\nHi"), 2, *tokenizer.encode("\n"), 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\n"
    assert tokenizer.eos_token_ids == {2}
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert model.model.embed_tokens.weight.shape == (len(tokenizer.vocab), 576)
    assert model.model.embed_tokens.weight.dtype == mx.float32
