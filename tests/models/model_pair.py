"""A tiny model in both forms, and greedy decoding without any cache to compare all modes with."""

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import mlx.core as mx
import mlx_lm

from mlx_flashhead import FlashHead, convert, get_flash_head, load, stream_generate
from model_folders import write_model

N_PROBES = 3


@dataclass(frozen=True)
class Pair:
    """One model, dense and with a FlashHead of few probes."""

    folder: Path
    dense_folder: Path
    model: object
    dense: object
    tokenizer: object

    @property
    def head(self) -> FlashHead:
        return get_flash_head(self.model)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def tokens(self, model, prompt, max_tokens=12, **options) -> list[int]:
        """What ``stream_generate`` gives."""
        stream = stream_generate(model, self.tokenizer, prompt, max_tokens=max_tokens, **options)
        return [response.token for response in stream]

    def expected(self, ids, n_tokens=12) -> list[int]:
        """What every mode has to give."""
        return uncached(self.dense, ids, n_tokens)

    def unverified(self, ids, n_tokens=12) -> list[int]:
        """What the FlashHead chooses by itself."""
        with self.head.settings():
            return uncached(self.model, ids, n_tokens)

    def until_end(self, tokens: list[int]) -> list[int]:
        """Without the end of the text and what was made after it."""
        return list(takewhile(lambda token: token not in self.tokenizer.eos_token_ids, tokens))


def make_pair(folder: Path, *, tied: bool, seed: int = 4) -> Pair:
    """Each token depends on all before it: a fresh model's follows from the last one alone, so that
    a wrong cache would not show."""
    dense = write_model(folder / "dense", tied=tied, hidden_size=128, seed=seed)
    file = str(dense / "model.safetensors")
    weights = mx.load(file)
    for name, array in weights.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            weights[name] = 6 * array
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    converted = folder / "converted"
    convert(str(dense), str(converted), n_probes=N_PROBES, calibration="none", progress=False)
    model, tokenizer = load(str(converted))
    return Pair(converted, dense, model, mlx_lm.load(str(dense))[0], tokenizer)


def uncached(model, prompt: list[int], n_tokens: int = 12) -> list[int]:
    """Greedy tokens, each by a forward pass over all tokens before it, whose last state alone
    goes through the head."""
    ids = list(prompt)
    for _ in range(n_tokens):
        hidden = model.model(mx.array([ids]))[:, -1:]
        if model.args.tie_word_embeddings:
            logits = model.model.embed_tokens.as_linear(hidden)
        else:
            logits = model.lm_head(hidden)
        ids.append(mx.argmax(logits).item())
    return ids[len(prompt) :]
