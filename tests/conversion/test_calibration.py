"""Hidden states for calibration: those that enter the head, with the tokens that follow them."""

from itertools import islice

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from mlx_flashhead.conversion import calibration
from mlx_flashhead.conversion.calibration import (
    generated_states,
    read_text,
    read_windows,
    text_states,
    windows_of,
)
from mlx_flashhead.conversion.prompts import chat_prompts
from mlx_flashhead.conversion.steps import Stopwatch
from mlx_flashhead.models.locate import find_head
from model_folders import BOS, VOCAB_SIZE, write_model
from tiny_models import tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 3
# and whether the head is tied; minicpm scales what enters its head
ARCHITECTURES = {
    "llama": False,
    "qwen3": True,
    "gemma3_text": True,
    "cohere": True,
    "minicpm": False,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A random llama and a tokenizer with a token a byte and a chat template."""
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "llama")))


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture
def endless(tokenizer, monkeypatch):
    """The tokenizer, where no token ends an answer."""
    monkeypatch.setattr(tokenizer, "_eos_token_ids", set())
    return tokenizer


def prompts_of(tokenizer, seed=0):
    return chat_prompts(tokenizer, np.random.default_rng(seed))


def generate(model, tokenizer, positions, *, prompts=None, seed=0, **kwargs):
    prompts = prompts_of(tokenizer, seed) if prompts is None else prompts
    return generated_states(
        model, tokenizer, find_head(model), prompts, positions, seed=seed, progress=False, **kwargs
    )


def hidden_of(model, token_ids):
    """What enters the head: the model without its head, on a whole sequence (L,) → (L, D)."""
    return np.array(model.model(mx.array([token_ids])).astype(mx.float32))[0]


def logits_of(model, states):
    return np.array(find_head(model).rows().matmul(mx.array(states)))


def test_generated_states_are_those_of_the_text(loaded, endless):
    """One sequence: replayed in one pass."""
    model, _ = loaded
    states, drawn = generate(model, endless, 60, seed=3)
    assert states.shape == (60, 64)
    assert states.dtype == np.float32
    assert drawn.shape == (60,)
    assert drawn.dtype == np.int64
    prompt = next(prompts_of(endless, 3))
    sequence = [*prompt, *drawn[:-1].tolist()]
    replayed = hidden_of(model, sequence)[len(prompt) - 1 :]
    np.testing.assert_allclose(states, replayed, atol=2e-4)


def test_sequences_in_a_batch_do_not_mix(loaded, endless, monkeypatch):
    """Prompts of different lengths, step by step and side by side."""
    model, _ = loaded
    monkeypatch.setattr(calibration, "SEQUENCE_TOKENS", 10)
    states, drawn = generate(model, endless, 40, seed=1)
    prompts = sorted(islice(prompts_of(endless, 1), 4), key=len)  # the order in which they are read
    assert len({len(prompt) for prompt in prompts}) > 1
    for i, prompt in enumerate(prompts):
        own = drawn[i::4]
        replayed = hidden_of(model, [*prompt, *own[:-1].tolist()])[len(prompt) - 1 :]
        np.testing.assert_allclose(states[i::4], replayed, atol=2e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_are_drawn_from_their_states(arch, tokenizer, monkeypatch):
    """Greedily, so that each token is known; answers end and others begin meanwhile."""
    monkeypatch.setattr(calibration, "SEQUENCE_TOKENS", 6)
    monkeypatch.setattr(calibration, "BATCH_SIZE", 3)
    model = tiny_model(arch, tied=ARCHITECTURES[arch], vocab_size=VOCAB_SIZE)
    ended = generate(model, tokenizer, 20, temperature=0.0)[1][0]
    monkeypatch.setattr(tokenizer, "_eos_token_ids", {int(ended)})
    states, drawn = generate(model, tokenizer, 50, temperature=0.0)
    assert states.shape == (50, 64)
    assert ended in drawn
    np.testing.assert_array_equal(logits_of(model, states).argmax(axis=1), drawn)


def test_the_seed_draws_other_tokens_after_the_same_prompts(loaded, endless):
    drawn = [
        generate(loaded[0], endless, 30, prompts=iter([[0, 5]]), seed=seed)[1] for seed in (0, 1, 0)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("positions", [1, 129])
def test_as_many_positions_as_asked_for(endless, positions):
    model = tiny_model(vocab_size=VOCAB_SIZE, dtype=mx.bfloat16)
    states, drawn = generate(model, endless, positions)
    assert states.dtype == np.float32
    assert len(states) == len(drawn) == positions
    assert ((drawn >= 0) & (drawn < VOCAB_SIZE)).all()


def test_no_further_states_when_the_time_is_up(loaded, endless):
    states, drawn = generate(loaded[0], endless, 10_000, limit=Stopwatch(0))
    assert states.shape == (0, 64)
    assert drawn.shape == (0,)
    states, drawn = generate(loaded[0], endless, 100_000, limit=Stopwatch(1))
    assert 0 < len(states) == len(drawn) < 100_000


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_text_states_enter_the_head(arch, tokenizer, monkeypatch):
    """In windows that each start afresh; the last token has no successor and so no state."""
    window = 40
    monkeypatch.setattr(calibration, "WINDOW_TOKENS", window)
    model = tiny_model(arch, tied=ARCHITECTURES[arch], vocab_size=VOCAB_SIZE)
    states, next_ids = text_states(model, tokenizer, find_head(model), TEXT, progress=False)
    token_ids = tokenizer.encode(TEXT)
    expected = [
        hidden_of(model, token_ids[start : min(start + window, len(token_ids) - 1)])
        for start in range(0, len(token_ids) - 1, window)
    ]
    if arch == "minicpm":
        expected = [hidden / (64 / 32) for hidden in expected]
    np.testing.assert_allclose(states, np.concatenate(expected), atol=2e-4)
    np.testing.assert_array_equal(next_ids, token_ids[1:])
    assert states.dtype == np.float32
    assert next_ids.dtype == np.int64


def test_every_window_begins_as_a_text_does(loaded, tmp_path, monkeypatch):
    """Models that were trained with BOS before every text are lost without it."""
    model = loaded[0]
    _, tokenizer = mlx_lm.load(str(write_model(tmp_path / "model")))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    token_ids = tokenizer.encode(TEXT)
    monkeypatch.setattr(calibration, "WINDOW_TOKENS", len(token_ids) // 3)
    states, next_ids = text_states(model, tokenizer, find_head(model), TEXT, progress=False)
    np.testing.assert_array_equal(next_ids, token_ids[1:])
    start = len(token_ids) // 3
    windows = [token_ids[i : i + start] for i in range(0, len(token_ids) - 1, start)]
    windows[-1] = windows[-1][: len(token_ids) - 1 - (len(windows) - 1) * start]
    expected = [hidden_of(model, windows[0])]
    expected += [hidden_of(model, [tokenizer.bos_token_id, *w])[1:] for w in windows[1:]]
    np.testing.assert_allclose(states, np.concatenate(expected), atol=2e-4)


def test_windows_read_together_do_not_mix(loaded, monkeypatch):
    """Of different lengths, so that some are padded."""
    model, tokenizer = loaded
    monkeypatch.setattr(calibration, "READ_TOKENS", 70)
    token_ids = tokenizer.encode(TEXT)
    windows = [token_ids[:30], token_ids[30:41], token_ids[50:52], token_ids[60:100]]
    found = read_windows(model, find_head(model), windows, progress=False)
    for states, window in zip(found, windows, strict=True):
        np.testing.assert_allclose(states, hidden_of(model, window[:-1]), atol=2e-4)


@pytest.mark.parametrize(
    ("milliseconds", "sizes"), [(10, [14, 14, 12, 15, 15, 15, 15]), (2, [14, 14, 12, 30, 30])]
)
@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_a_step_reads_what_its_time_allows(tokenizer, arch, milliseconds, sizes, monkeypatch):
    """Windows of 40 and 60 tokens in steps of 0.1 s, the first of 16 tokens or fewer, as if a token
    took so many milliseconds. Each part of a window sees what came before it."""
    model = tiny_model(arch, tied=ARCHITECTURES[arch], vocab_size=VOCAB_SIZE)
    location, now = find_head(model), 0.0

    def slow_forward(model, tokens, cache, forward=calibration.forward):
        nonlocal now
        now += tokens.size * milliseconds / 1000
        return forward(model, tokens, cache)

    token_ids = tokenizer.encode(TEXT)
    windows = [token_ids[:41], token_ids[41:102]]
    whole = read_windows(model, location, windows, progress=False)
    monkeypatch.setattr(calibration, "forward", slow_forward)
    monkeypatch.setattr(calibration, "monotonic", lambda: now)
    steps = read_windows.steps(model, location, windows, step_seconds=0.1)
    done = [0]
    while True:
        try:
            done.append(next(steps).done)
        except StopIteration as end:
            found = end.value
            break
    assert np.diff(done).tolist() == sizes
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_windows_begin_with_the_token_that_ended_the_one_before():
    assert windows_of(list(range(8)), 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert windows_of([1, 2, 3, 4], 3) == [[1, 2, 3, 4]]


@pytest.mark.parametrize("positions", [5, 10_000])
def test_text_states_stop_at_the_positions_asked_for(loaded, positions):
    model, tokenizer = loaded
    states, next_ids = text_states(
        model, tokenizer, find_head(model), TEXT, positions=positions, progress=False
    )
    token_ids = tokenizer.encode(TEXT)
    assert len(states) == min(positions, len(token_ids) - 1)
    np.testing.assert_array_equal(next_ids, token_ids[1 : len(states) + 1])


def test_too_short_a_text(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="too short to measure anything on: give one of some"):
        text_states(model, tokenizer, find_head(model), "a", progress=False)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read .No such file or directory.: check the path"),
        ("folder", "cannot be read .Is a directory.: check the path"),
        (b" \n\t ", "is empty: give a text of some pages"),
        (b"\xff\xfe\x00text", "is not UTF-8 text: give a plain text file"),
    ],
)
def test_unreadable_texts_are_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "text.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_text(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
