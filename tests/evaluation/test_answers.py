"""Whole greedy answers against the dense model's, beside those of mlx-lm's own loop."""

import json

import mlx_lm
import numpy as np
import pytest
from test_text import installed_model

from mlx_flashhead import get_flash_head, stream_generate
from mlx_flashhead.evaluation import answers
from mlx_flashhead.evaluation.answers import evaluate_answers
from model_folders import write_model

ASKED = ["Why?", "Name a river.", "Count to ten", "Who?", "Say something about bridges."]
TOKENS = 12
REQUESTS = answers.usual_requests()


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setattr(answers, "usual_requests", lambda: ASKED)
    monkeypatch.setattr(answers, "MOST_TOKENS", TOKENS)


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def tokenizer(request, tmp_path_factory):
    options = {} if request.param else {"chat_template": None}
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "m", **options)))[1]


@pytest.fixture(scope="module")
def model(tokenizer):
    return installed_model(eos_token_ids=tuple(tokenizer.eos_token_ids))


def answer(model, tokenizer, text, **settings):
    prompt = text
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    stream = stream_generate(model, tokenizer, prompt, max_tokens=TOKENS, verify=False, **settings)
    return [response.token for response in stream]


def test_answers_are_those_of_generation(model, tokenizer):
    found = evaluate_answers(model, tokenizer, [1, 6, 33])
    dense = [answer(model, tokenizer, text, dense=True) for text in ASKED]
    assert found["positions"] == sum(map(len, dense))
    assert found["chat_template"] == tokenizer.has_chat_template
    for measured in found["measures"]:
        own = [answer(model, tokenizer, text, n_probes=measured["n_probes"]) for text in ASKED]
        same = [a == b for a, b in zip(dense, own, strict=True)]
        assert measured["identical"] == pytest.approx(np.mean(same))
        partings = [
            next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            for a, b, equal in zip(dense, own, same, strict=True)
            if not equal
        ]
        if partings:
            assert measured["median_parting"] == np.median(partings)
            assert measured["agreement"] < 1
        else:
            assert (measured["median_parting"], measured["agreement"]) == (None, 1)
    few, _, all_of_them = found["measures"]
    assert few["identical"] < 1 == all_of_them["identical"]


def test_by_default_half_once_and_twice_the_probes(model, tokenizer):
    found = evaluate_answers(model, tokenizer)
    own = get_flash_head(model).n_probes
    assert [measured["n_probes"] for measured in found["measures"]] == [own // 2, own, 2 * own]
    assert json.loads(json.dumps(found, allow_nan=False))["requests"] == len(ASKED)
    assert len(REQUESTS) == len(set(REQUESTS)) >= 100
