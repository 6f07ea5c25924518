"""SmolLM2's folder: its tokenizer and its weights."""

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

PROSE = (
    "Photosynthesis is the process by which plants, algae, and some bacteria convert light energy "
    "into chemical energy. During photosynthesis, plants absorb carbon dioxide from the air and "
    "water from the soil. Using energy from sunlight, they convert these into glucose and oxygen."
)


@pytest.fixture(scope="module")
def real_model(real_model_folder):
    """(model, tokenizer) as mlx-lm loads them."""
    return mlx_lm.load(str(real_model_folder))


@pytest.mark.real
def test_text_survives_the_tokenizer_and_every_digit_is_a_token(real_model):
    _, tokenizer = real_model
    text = "  café, 東京, e\u0301, 🙂👩‍🚀 \n\n\ttabs\r\n  f'{i:>3}' don't a \u0000 byte"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = [tokenizer.decode([token_id]) for token_id in tokenizer.encode("x=31415 in 2024")]
    assert tokens == ["x", "=", "3", "1", "4", "1", "5", " in", " ", "2", "0", "2", "4"]


@pytest.mark.real
def test_special_tokens(real_model):
    _, tokenizer = real_model
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|endoftext|>")
    assert ids == [1, *tokenizer.encode("user\nHi"), 2, *tokenizer.encode("\n"), 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\n"
    assert tokenizer.eos_token_ids == {2}
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 0)


@pytest.mark.real
def test_every_token_has_a_row_and_prose_is_likely(real_model):
    model, tokenizer = real_model
    assert model.model.embed_tokens.weight.shape == (len(tokenizer.vocab), 576)
    assert model.model.embed_tokens.weight.dtype == mx.float32
    ids = mx.array([tokenizer.encode(PROSE)])
    losses = nn.losses.cross_entropy(model(ids)[:, :-1], ids[:, 1:], reduction="mean")
    # 1.58 nats per token; rows in the wrong order for the rotary embedding give more than 2.5.
    assert losses.item() < 1.7
