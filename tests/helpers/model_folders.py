"""Tiny models in real folders, with a tokenizer: what conversion reads and the commands load."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# One token a byte, a beginning and an end: no multiple of 16.
BOS = "<s>"
EOS = "</s>"
VOCAB_SIZE = 258
CARD = "---\nlicense: mit\n---\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Saves a byte-level tokenizer into ``folder``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)


def write_model(
    folder: Path,
    *,
    arch="llama",
    tied=True,
    dtype=mx.float32,
    by_mlx=True,
    hidden_size=64,
    vocab_size=VOCAB_SIZE,
    seed=0,
    chat_template=CHAT_TEMPLATE,
    card=CARD,
    further=None,
) -> Path:
    """Writes a random two-layer model and its README.md, the ``card``.

    The module ``arch`` of mlx-lm takes a llama's configuration, and ``further`` entries. Without
    ``by_mlx`` the weights are marked as PyTorch's.
    """
    config = {
        "model_type": arch,
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if further is not None:
        config |= further
    mx.random.seed(seed)
    architecture = importlib.import_module(f"mlx_lm.models.{arch}")
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        # Matrices are larger than a fresh layer's, so that the logits differ from token to token.
        if array.ndim == 2:
            array = array * 4
        weights[name] = array.astype(dtype)
    folder.mkdir(parents=True)
    stored_by = "mlx" if by_mlx else "pt"
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": stored_by})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, chat_template)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of a folder's files, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """All that lies under a folder: files with their contents, and folders with None."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder)] = content
    return found
