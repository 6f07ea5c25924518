"""What a model is asked for when it writes the text it is calibrated on."""

from itertools import islice

import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.conversion import prompts
from mlx_flashhead.conversion.prompts import chat_prompts, varied_prompts
from model_folders import BOS, VOCAB_SIZE, write_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token a byte, and a chat template."""
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "chat")))[1]


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    """The same without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    return mlx_lm.load(str(write_model(folder, chat_template=None)))[1]


def test_chat_prompts_are_requests(tokenizer):
    found = list(islice(chat_prompts(tokenizer, np.random.default_rng(0)), 50))
    assert all(tokenizer.decode(prompt).endswith("[assistant] ") for prompt in found)
    assert len({tuple(prompt) for prompt in found}) > 40


def test_prompts_are_requests_beginnings_and_single_tokens_in_turn(tokenizer):
    found = list(islice(varied_prompts(tokenizer, VOCAB_SIZE, np.random.default_rng(0)), 300))
    requests, beginnings, singles = found[::3], found[1::3], found[2::3]
    for prompt in requests:
        text = tokenizer.decode(prompt)
        assert text.startswith(f"{BOS}[user] ")
        assert text.endswith("[assistant] ")
    assert len({tuple(prompt) for prompt in requests}) > 60
    texts = {tokenizer.decode(prompt) for prompt in beginnings}
    assert len(texts) > 40 and texts <= set(prompts.BEGINNINGS)
    beginning = tokenizer.bos_token_id
    special = set(tokenizer.all_special_ids)
    assert all(p[0] == beginning and len(p) == 2 and p[1] not in special for p in singles)
    assert len({p[1] for p in singles}) > 60


def test_prompts_without_a_chat_template(plain_tokenizer):
    found = varied_prompts(plain_tokenizer, VOCAB_SIZE, np.random.default_rng(0))
    text = plain_tokenizer.decode(next(found))
    assert any(text.startswith(r.split("{}")[0]) for r in prompts.REQUESTS)
    assert "[user]" not in text


def test_random_tokens_have_a_row(tokenizer):
    """A head may have fewer rows than the tokenizer has tokens."""
    found = varied_prompts(tokenizer, 50, np.random.default_rng(0))
    singles = [p for i, p in enumerate(islice(found, 150)) if i % 3 == 2]
    assert max(p[1] for p in singles) < 50
