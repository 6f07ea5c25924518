"""Tiny models that say what a test wants: after each token, one certain other token."""

from pathlib import Path

import mlx.core as mx
from transformers import PreTrainedTokenizerFast

from model_folders import CHAT_TEMPLATE, VOCAB_SIZE, write_model

# Logit of the token that follows; those of the others are about 1.
CERTAIN = 40.0
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{% for tool_call in message.tool_calls or [] %}"
    "<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}{% endfor %}"
) + CHAT_TEMPLATE


def write_chain_model(
    folder: Path,
    *chains: list[str],
    words: tuple[str, ...] = (),
    endless: bool = False,
    context: int = 512,
) -> Path:
    """Writes a llama whose next token depends on the last one alone.

    ``chains`` are texts of one token each, in the order in which they follow each other; a text
    occurs in one place. The last one is followed by the end, or by the second if ``endless``. The
    tokenizer knows single characters and ``words``, and the model has a ``context`` of so many
    tokens.
    """
    options = {"tied": False, "hidden_size": 128, "chat_template": TOOL_TEMPLATE}
    options["further"] = {"max_position_embeddings": context}
    write_model(folder, vocab_size=VOCAB_SIZE + len(words), **options)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    # They are read before the file is written anew.
    mx.eval(weights)
    for name, array in weights.items():
        if "o_proj" in name or "down_proj" in name:
            # What comes out is what went in.
            weights[name] = mx.zeros_like(array)
    embeddings = weights["model.embed_tokens.weight"]
    hidden = mx.fast.rms_norm(embeddings, mx.ones(128), 1e-5)
    rows = mx.random.normal(embeddings.shape, key=mx.random.key(0)) / 128
    for chain in chains:
        ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in chain]
        if endless:
            end = ids[1]
        else:
            end = tokenizer.eos_token_id
        for last, following in zip(ids, [*ids[1:], end], strict=True):
            rows[following] += hidden[last] * CERTAIN / 128
    weights["lm_head.weight"] = rows
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
