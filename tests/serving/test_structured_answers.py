"""Answers of a given form, through OpenAI's client: whole, streamed, and several at once."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import openai
import pytest

import mlx_flashhead

MESSAGES = [{"role": "user", "content": "One day"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "on": {"type": "boolean"}},
    "required": ["name", "on"],
    "additionalProperties": False,
}


def ask(client, **options):
    options = {"messages": MESSAGES, "max_tokens": 60} | options
    return client.chat.completions.create(model="mine", **options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_the_packages(client, flash, stream):
    processor = mlx_flashhead.grammar_processor(flash[1], json_schema=SCHEMA)
    prompt = flash[1].apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = mlx_flashhead.generate(*flash, prompt, max_tokens=60, logits_processors=[processor])
    answer = ask(client, response_format=schema_format(SCHEMA), stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join((c.delta.content or "") if stream else c.message.content for c in choices)
    assert text == expected and json.loads(text).keys() == {"name", "on"}
    assert choices[-1].finish_reason == "stop"


def test_several_forms_at_once(client):
    """Requests in one batch, each in its own form, one of them in none."""
    patterns = ["[0-9]{5}", "(ab){3,4}", "x|yy|zzz", None, "-[a-f]{8}-"]

    def one(pattern):
        body = None if pattern is None else {"regex": pattern}
        answer = ask(client, extra_body=body, max_tokens=20, n=2)
        return [choice.message.content for choice in answer.choices]

    alone = [one(pattern) for pattern in patterns]
    with ThreadPoolExecutor(len(patterns)) as pool:
        together = list(pool.map(one, patterns))
    assert together == alone  # greedy
    for pattern, texts in zip(patterns, alone, strict=True):
        assert pattern is None or all(re.fullmatch(pattern, text) for text in texts)


def test_a_schema_that_no_text_fits_is_told(client):
    with pytest.raises(openai.BadRequestError, match="No text fits the JSON schema") as raised:
        ask(client, response_format=schema_format({"$ref": "#"}))
    assert raised.value.param == "response_format"


def test_an_ambiguous_grammar_stops_nobody_else(client):
    """Its 16 texts end with a sentence, and another client's goes on meanwhile."""
    choices = " | ".join(" ".join(["s"] * n) for n in range(2, 65))
    grammar = {"grammar": f'start: s\ns: {choices} | "a"'}
    arrived = []

    def other():
        for _ in ask(client, stream=True, max_tokens=300, logit_bias={"50": 100}):
            arrived.append(time.monotonic())

    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(other)
        while len(arrived) < 5:
            time.sleep(0.01)
        with pytest.raises(openai.BadRequestError, match=r"cannot be followed any further \(.*\)"):
            ask(client, extra_body=grammar, n=16)
        text.result()
    assert len(arrived) >= 300
    assert max(after - before for before, after in pairwise(arrived)) < 5  # 0.1 to 0.4 by itself
