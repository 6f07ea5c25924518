"""Writes a model's GGUF file as an ordinary Hugging Face folder.

Weights are dequantized; the tokenizer is made of the file's tokens, merges and scores.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as splits
from tqdm import tqdm

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# A layer's modules in GGUF and at Hugging Face.
LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Sizes at Hugging Face and in GGUF, after the architecture's name.
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
}
# Kinds of tokens in a GGUF file.
SPECIAL_TOKEN = 3
USER_DEFINED_TOKEN = 4
SPACE = "▁"
# So many rows are dequantized between two moves of the bar.
ROWS_AT_ONCE = 8192
# Source: the pre_tokenizer in tokenizer.json of Qwen/Qwen2.5-Coder-1.5B-Instruct.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Conversion:
    """What an architecture makes of a GGUF file.

    Attributes:
        config: The architecture's entries of config.json.
        special: Ids of "bos", "eos", "pad" and "unk".
        names: The names of a layer's modules at Hugging Face, by those in the file.
    """

    config: dict[str, Any]
    tokenizer: Tokenizer
    special: dict[str, int]
    names: dict[str, str]


def write_folder(folder: Path, gguf: Path, dtype: str) -> None:
    """Writes a GGUF file's weights, settings and tokenizer.

    Args:
        folder: An existing folder.
        gguf: The file.
        dtype: The weights' type, a key of ``DTYPES``.

    Raises:
        ValueError: If the package gguf is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            "The package gguf, which reads the model's quantized layers, is missing: "
            "pip install gguf."
        ) from None
    print(f"Reading {gguf.name} …", flush=True)
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata["general.architecture"]
    config: dict[str, Any] = {"_name_or_path": gguf.name}
    for name, key in SIZES.items():
        config[name] = metadata[f"{architecture}.{key}"]
    # 1e-05, which the file stores as float32
    epsilon = metadata[f"{architecture}.attention.layer_norm_rms_epsilon"]
    config["rms_norm_eps"] = float(f"{epsilon:.6g}")
    conversion = CONVERSIONS.get(architecture, gemma_conversion)(metadata)
    config |= conversion.config
    weights = read_weights(reader, config, conversion.names, DTYPES[dtype])
    print("Saving the weights …", flush=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    ids = {f"{kind}_token_id": conversion.special[kind] for kind in ("bos", "eos", "pad")}
    config["tie_word_embeddings"] = True
    config["vocab_size"] = weights["model.embed_tokens.weight"].shape[0]
    config |= ids
    config["torch_dtype"] = dtype
    conversion.tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_config(metadata, conversion.special, config["max_position_embeddings"]),
    )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def read_weights(
    reader: Any, config: dict[str, Any], names: dict[str, str], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Dequantizes the weights of a file, and shows a bar.

    Args:
        reader: A reader of the file, of gguf.
        config: The model's configuration.
        names: Of a layer's modules at Hugging Face, by those in the file.
        dtype: Of the weights.

    Returns:
        The weights by their names at Hugging Face.
    """
    architecture = config["model_type"]
    weights: dict[str, mx.array] = {}
    n_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    bar = tqdm(total=n_weights, desc="Dequantizing the weights", unit_scale=True)
    for tensor in reader.tensors:
        weight = dequantized(tensor, bar)
        if architecture == "llama" and ".attn_q." in tensor.name:
            weight = half_split_rows(weight, config["num_attention_heads"])
        elif architecture == "llama" and ".attn_k." in tensor.name:
            weight = half_split_rows(weight, config["num_key_value_heads"])
        elif architecture == "gemma3_text" and tensor.name.endswith("norm.weight"):
            # llama.cpp multiplies by it as it is, and Gemma by one more.
            weight = weight - 1
        name = hugging_face_name(tensor.name, names)
        if tensor.name != "token_embd.weight" or name not in weights:
            weights[name] = mx.array(weight).astype(dtype)
    bar.close()
    return weights


def dequantized(tensor: Any, bar: tqdm) -> np.ndarray:
    """A tensor's weights (n_rows, D) or (D,) float32; advances a bar by as many."""
    from gguf.quants import dequantize

    parts = []
    for start in range(0, len(tensor.data), ROWS_AT_ONCE):
        part = dequantize(tensor.data[start : start + ROWS_AT_ONCE], tensor.tensor_type)
        parts.append(part.astype(np.float32))
        bar.update(part.size)
    return np.concatenate(parts)


def llama_conversion(metadata: dict[str, Any]) -> Conversion:
    """A llama's configuration and tokenizer."""
    digits = splits.Digits(individual_digits=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
    }
    tokenizer = byte_level_tokenizer(metadata, digits, splits.ByteLevel(False))
    return Conversion(config, tokenizer, special_ids(metadata), LLAMA_NAMES)


def qwen2_conversion(metadata: dict[str, Any]) -> Conversion:
    """The configuration and tokenizer of a Qwen2."""
    pieces = splits.Split(Regex(QWEN_PIECES), "isolated")
    as_bytes = splits.ByteLevel(False, use_regex=False)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
    }
    tokenizer = byte_level_tokenizer(metadata, pieces, as_bytes)
    tokenizer.normalizer = normalizers.NFC()
    return Conversion(config, tokenizer, special_ids(metadata), LLAMA_NAMES)


def gemma_conversion(metadata: dict[str, Any]) -> Conversion:
    """The configuration and tokenizer of a Gemma 3."""
    width = metadata["gemma3.attention.key_length"]
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": width,
        "query_pre_attn_scalar": width,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        "sliding_window_pattern": 6,
    }
    # The model was trained with these.
    special = {"bos": 2, "eos": 1, "pad": 0, "unk": 3}
    return Conversion(config, gemma_tokenizer(metadata, special), special, GEMMA_NAMES)


CONVERSIONS = {"llama": llama_conversion, "qwen2": qwen2_conversion, "gemma3": gemma_conversion}


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids of the special tokens that a file names, by their kinds."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {}
    for kind, key in keys.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            ids[kind] = token_id
    return ids


def tokenizer_config(
    metadata: dict[str, Any], special: dict[str, int], length: int
) -> dict[str, Any]:
    """The content of tokenizer_config.json.

    Args:
        metadata: The file's settings.
        special: The ids of the special tokens, by their kinds.
        length: The greatest number of tokens.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    # This class takes tokenizer.json as it is.
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for kind, token_id in special.items():
        config[f"{kind}_token"] = tokens[token_id]
    config["clean_up_tokenization_spaces"] = False
    config["model_max_length"] = length
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def hugging_face_name(name: str, names: dict[str, str]) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    # a head of its own has the embedding's rows in more bits
    outside = {"token_embd": "embed_tokens", "output": "embed_tokens", "output_norm": "norm"}
    module, kind = name.rsplit(".", 1)
    if module in outside:
        return f"model.{outside[module]}.{kind}"
    _, layer, module = module.split(".")
    return f"model.layers.{layer}.{names[module]}.{kind}"


def half_split_rows(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Puts the rows (n_heads · head_dim, D) of a query or key projection in Hugging Face's order.

    GGUF interleaves the two halves of each head's rows, for rotary embeddings of neighbouring
    pairs; Hugging Face's llama rotates the first half against the second.

    Source: ``LlamaModel.permute`` in llama.cpp's ``convert_hf_to_gguf.py``, inverted.
    """
    n_rows, dim = weight.shape
    pairs = weight.reshape(n_heads, n_rows // n_heads // 2, 2, dim)
    return pairs.swapaxes(1, 2).reshape(n_rows, dim)


def byte_level_tokenizer(metadata: dict[str, Any], *pieces: splits.PreTokenizer) -> Tokenizer:
    """Byte-level BPE within the ``pieces`` of a text, to which no token is added."""
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(metadata), merges=merges))
    tokenizer.pre_tokenizer = splits.Sequence(list(pieces))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(added_tokens(metadata, SPECIAL_TOKEN))
    tokenizer.add_tokens(added_tokens(metadata, USER_DEFINED_TOKEN))
    return tokenizer


def gemma_tokenizer(metadata: dict[str, Any], special: dict[str, int]) -> Tokenizer:
    """Byte-pair merges with bytes for unknown characters; a text begins with BOS."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = vocabulary(metadata)
    pieces = models.BPE(
        vocab=vocab,
        merges=merges_of(vocab, metadata["tokenizer.ggml.scores"]),
        unk_token=tokens[special["unk"]],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(added_tokens(metadata, SPECIAL_TOKEN))
    tokenizer.add_tokens(added_tokens(metadata, USER_DEFINED_TOKEN))
    bos = tokens[special["bos"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special["bos"])]
    )
    return tokenizer


def vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    """Ids by token."""
    return {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def added_tokens(metadata: dict[str, Any], kind: int) -> list[AddedToken]:
    """The tokens of a kind, which are never cut."""
    kinds = metadata["tokenizer.ggml.token_type"]
    return [
        AddedToken(token, special=kind == SPECIAL_TOKEN, normalized=False)
        for token, its_kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True)
        if its_kind == kind
    ]


def merges_of(vocab: dict[str, int], scores: Iterable[float]) -> list[tuple[str, str]]:
    """The merges behind pieces that were stored with scores: the highest score comes first.

    Each way to cut a piece into two known ones is a merge; equal scores are ordered by the ids of
    the two.

    Source: ``generate_merges`` in transformers' ``convert_slow_tokenizer.py``.
    """
    merges = []
    for piece, score in zip(vocab, scores, strict=True):
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
