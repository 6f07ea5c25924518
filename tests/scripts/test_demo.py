"""The demo's comparison, on a tiny model."""

import io

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from demo import answers, captured_states, compare
from mlx_flashhead import load
from mlx_flashhead.models.dense import load_dense


@pytest.fixture(scope="module")
def models(dense, converted):
    model, tokenizer, _ = load_dense(dense)
    return model, load(str(converted), n_probes=2)[0], tokenizer


@pytest.mark.parametrize("terminal", [True, False])
def test_shows_both_texts_the_table_and_the_share_of_right_proposals(models, terminal, capsys):
    dense, flash, tokenizer = models
    messages = [{"role": "user", "content": "hello"}]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    *_, answer = answers(dense, tokenizer, prompt, 40)
    states = captured_states(dense, prompt, answer.token_ids)
    chosen = [mx.argmax(flash.lm_head(state[None])).item() for state in states]
    same = np.mean(np.array(chosen) == np.array(answer.token_ids))
    assert 0 < same < 1
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    compare(flash, tokenizer, "hello", max_tokens=40, runs=2, console=console)
    output = console.file.getvalue()
    for word in ("hello", "dense", "FlashHead", "tokens/s", "ratio", "same", "2 of 17 clusters"):
        assert word in output
    assert f"{100 * same:.1f} % of its proposals were right" in output
    assert ("\x1b[" in output) == terminal
    assert "Warning" not in capsys.readouterr().err


def test_texts_and_states_are_the_models_own(models):
    dense, flash, tokenizer = models
    prompt = tokenizer.encode("hello")
    *_, of_dense = answers(dense, tokenizer, prompt, 12)
    *_, of_flash = answers(flash, tokenizer, prompt, 12)
    ids = list(prompt)
    for token in of_dense.token_ids:
        assert token == mx.argmax(dense(mx.array([ids]))[0, -1]).item()
        ids.append(token)
    assert of_flash.token_ids == of_dense.token_ids
    logits = dense.lm_head(captured_states(dense, prompt, of_dense.token_ids))
    assert mx.argmax(logits, axis=-1).tolist() == of_dense.token_ids
