"""The server with a trained drafter: answers are plain mlx-lm's, alone and beside others."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import load as load_tokenizer

pytest.importorskip("mlx_vlm")

from always_guessing import guess_always
from engines import CHUNK, flags, submit, tokens_of
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.served_models import ServedModel
from model_folders import VOCAB_SIZE, write_tokenizer
from trained_drafters import exact_pair

# This is longer than two chunks.
LONG = [2 + (7 * i) % 250 for i in range(40)]
SHORT = [40, 41, 42]


@pytest.mark.parametrize("arguments", [(), ("--kv-bits", 8, "--kv-group-size", 32)])
def test_answers(tmp_path, monkeypatch, arguments):
    guess_always(monkeypatch)
    write_tokenizer(tmp_path)
    model, drafter = exact_pair("qwen3_5", noise=0.3, vocab_size=VOCAB_SIZE)
    # The engine's thread could not evaluate what was made in this one.
    mx.eval(model.parameters(), drafter.module.parameters())
    tokenizer = load_tokenizer(tmp_path)

    def plain(prompt, n_tokens):
        steps = generate_step(mx.array(prompt), model, max_tokens=n_tokens)
        tokens = [token for token, _ in steps]
        if 1 in tokens:
            return tokens[: tokens.index(1)]
        return tokens

    expected = {name: plain(prompt, 30) for name, prompt in (("long", LONG), ("short", SHORT))}

    def load():
        return [ServedModel(("tiny",), model, tokenizer, None, 10_000, drafter=drafter)]

    engine = Engine(load, flags("--prefill-step-size", CHUNK, *arguments))
    try:
        alone = submit(engine, LONG, 30)
        assert tokens_of(alone) == expected["long"]
        assert alone.n_guessed > 3
        several = [submit(engine, prompt, 30) for prompt in (LONG, SHORT, LONG)]
        texts = [tokens_of(job) for job in several]
        assert texts == [expected["long"], expected["short"], expected["long"]]
    finally:
        assert engine.close(60)
