"""Calibration: the built-in text, and the states that enter the head, with the next tokens."""

from collections import Counter
from functools import partial
from itertools import product

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from drafts import REQUESTS
from mlx_flashhead.conversion import builtin_text, calibration, run_task
from mlx_flashhead.conversion.builtin_text import (
    CONTEXT,
    DIALOGUE,
    PYTHON,
    SHARES,
    builtin_documents,
    builtin_windows,
    dialogues,
)
from mlx_flashhead.conversion.calibration import text_states
from mlx_flashhead.models.locate import find_head
from model_folders import BOS, VOCAB_SIZE, write_model
from tiny_models import tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
# And whether the head is tied; minicpm scales what enters its head.
ARCHITECTURES = {"llama": False, "gemma3_text": True, "cohere": True, "minicpm": False}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A random llama and a tokenizer with a token a byte and a chat template."""
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "llama")))


def hidden_of(model, token_ids):
    """What enters the head: the model without its head, on a whole sequence (L,) → (L, D)."""
    return np.array(model.model(mx.array([token_ids])).astype(mx.float32))[0]


@pytest.mark.parametrize("begins, arch", [*product([False], ARCHITECTURES), (True, "llama")])
def test_text_states_enter_the_head(begins, arch, tmp_path, monkeypatch):
    """In windows that each begin as a text does, since models that were trained with BOS before
    every text are lost without it; the last token has no successor and so no state."""
    monkeypatch.setattr(calibration, "TEXT_WINDOW", 40)
    model = tiny_model(arch, tied=ARCHITECTURES[arch], vocab_size=VOCAB_SIZE)
    _, tokenizer = mlx_lm.load(str(write_model(tmp_path / "model")))
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
        )
    token_ids = tokenizer.encode(TEXT)
    expected = []
    states, next_ids = run_task(text_states(model, tokenizer, find_head(model), TEXT))
    for start in range(0, len(token_ids) - 1, 40):
        window = token_ids[start : min(start + 40, len(token_ids) - 1)]
        if begins and start > 0:
            expected.append(hidden_of(model, [tokenizer.bos_token_id, *window])[1:])
        else:
            expected.append(hidden_of(model, window))
    expected = np.concatenate(expected)
    if arch == "minicpm":
        # It divides its states by its width over `dim_model_base`.
        expected /= 64 / 32
    np.testing.assert_allclose(states, expected, atol=2e-4)
    np.testing.assert_array_equal(next_ids, token_ids[1:])
    assert (states.dtype, next_ids.dtype) == (np.float32, np.int64)
    few, _ = run_task(text_states(model, tokenizer, find_head(model), TEXT, positions=5))
    np.testing.assert_allclose(few, states[:5], atol=2e-4)


@pytest.mark.parametrize(
    ("milliseconds", "sizes"), [(2.0, [14, 14, 12, 15, 15, 15, 15]), (1.25, [14, 14, 12, 30, 30])]
)
def test_a_step_reads_what_its_time_allows(loaded, milliseconds, sizes, monkeypatch):
    """Windows of 40 and 60 tokens in steps of 0.1 s, the first of 16 tokens or fewer, as if a token
    took so many milliseconds. Each part of a window sees what came before it."""
    model = tiny_model("gemma3_text", vocab_size=VOCAB_SIZE)
    location = find_head(model)
    now = 0.0

    def slow_forward(model, tokens, cache, forward=calibration.forward):
        nonlocal now
        now += (tokens.size + calibration.WEIGHTS_TOKENS) * milliseconds / 1000
        return forward(model, tokens, cache)

    token_ids = loaded[1].encode(TEXT)
    windows = [token_ids[:41], token_ids[41:102]]
    read = partial(calibration.read_windows, model, location, windows)
    whole = run_task(read())
    monkeypatch.setattr(calibration, "forward", slow_forward)
    monkeypatch.setattr(calibration, "monotonic", lambda: now)
    found = []

    def recorded():
        found.extend((yield from read(step_seconds=0.1)))

    assert [step.added for step in recorded()] == [0, *sizes]
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_builtin_states_are_those_of_their_windows(loaded, monkeypatch):
    """Without the first tokens of each window, and without windows after the time limit."""
    arguments = (*loaded, find_head(loaded[0]))
    (model, tokenizer) = loaded
    states, next_ids, cut_short = run_task(calibration.builtin_states(*arguments, positions=600))
    assert states.shape == (600, 64)
    assert states.dtype == np.float32
    assert not cut_short
    windows = builtin_windows(tokenizer, 600)
    expected = np.concatenate([hidden_of(model, window[:-1])[CONTEXT:] for window in windows])
    np.testing.assert_allclose(states, expected, atol=2e-4)
    assert next_ids.tolist() == [token for window in windows for token in window[CONTEXT + 1 :]]
    monkeypatch.setattr(calibration, "READ_TOKENS", 700)
    few = calibration.builtin_states(*arguments, positions=4000, seconds=1e-9)
    states, next_ids, cut_short = run_task(few)
    assert 0 < len(states) == len(next_ids) < 1000
    assert cut_short


def test_what_an_installation_lacks_is_left_out(monkeypatch):
    documents = builtin_documents()
    read = builtin_text.read_parts
    own = len(read("documentation"))
    assert "def " in "".join(documents[PYTHON])
    assert len(documents[PYTHON]) > 30
    assert len(documents["documentation"]) > own + 30
    few = {"modules": ["no_such_module textwrap _thread"], "topics": ["no-such-topic with"]}

    def read_few(name):
        if name in few:
            return few[name]
        return read(name)

    monkeypatch.setattr(builtin_text, "read_parts", read_few)
    found = builtin_documents()
    assert (len(found[PYTHON]), len(found["documentation"])) == (1, 1 + own)
    assert found["prose"] == documents["prose"]


def test_dialogues_alternate():
    found = dialogues()
    assert len(found) > 10
    for messages in found:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        contents = [m["content"] for m in messages]
        assert all(text == text.strip() and "User:" not in text for text in contents)
        assert not set(contents) & set(REQUESTS.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("options", [{}, {"chat_template": None}], ids=["chat", "plain"])
def test_the_kinds_take_turns(options, tmp_path):
    """50 positions of each kind, twice as many of the languages; the first windows are of all."""
    _, tokenizer = mlx_lm.load(str(write_model(tmp_path / "m", **options)))

    def as_text(token_ids):
        return "".join(map(chr, token_ids))

    texts = {
        kind: "|".join(as_text(tokenizer.encode(text)) for text in documents)
        for kind, documents in builtin_documents().items()
    }

    def kind_of(window):
        for kind, text in texts.items():
            if as_text(window) in text:
                return kind
        return DIALOGUE

    found = builtin_windows(tokenizer, 500)
    counts = Counter()
    kinds = [kind_of(window) for window in found]
    for kind, window in zip(kinds, found, strict=True):
        counts[kind] += len(window) - 1 - CONTEXT
    assert counts == {kind: 50 * share for kind, share in SHARES.items()}
    assert set(kinds[: len(SHARES)]) == set(SHARES)
