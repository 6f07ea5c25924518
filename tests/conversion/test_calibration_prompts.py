"""What a model is asked for when it writes the text it is calibrated on."""

from itertools import islice

import mlx_lm
import numpy as np
import pytest

from mlx_flashhead.conversion import prompts
from mlx_flashhead.conversion.prompts import chat_prompts
from model_folders import write_model


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


def test_prompts_without_a_chat_template(plain_tokenizer):
    found = chat_prompts(plain_tokenizer, np.random.default_rng(0))
    text = plain_tokenizer.decode(next(found))
    assert any(text.startswith(r.split("{}")[0]) for r in prompts.REQUESTS)
    assert "[user]" not in text
