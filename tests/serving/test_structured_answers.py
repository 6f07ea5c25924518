"""Answers of a given form, through OpenAI's client: whole, streamed, and several at once."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import jsonschema
import openai
import pytest

import mlx_flashhead

MESSAGES = [{"role": "user", "content": "One day"}]
SCHEMAS = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"const": True}, {"type": "object", "maxProperties": 0}]},
]


def ask(client, response_format=openai.NOT_GIVEN, **options):
    options = {"messages": MESSAGES, "max_tokens": 150} | options
    return client.chat.completions.create(model="mine", response_format=response_format, **options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_schema(client, schema, stream):
    answer = ask(client, schema_format(schema), stream=stream, temperature=0.8, seed=3)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text = "".join((c.delta.content or "") if stream else c.message.content for c in choices)
    if choices[-1].finish_reason == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:  # an integer may have many digits
        assert choices[-1].finish_reason == "length" and schema is SCHEMAS[0]


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


def test_grammar_of_a_text(client):
    options = {"model": "mine", "prompt": "One day", "max_tokens": 9}
    grammar = {"grammar": 'start: "yes" | "no"'}
    choice = client.completions.create(extra_body=grammar, **options).choices[0]
    assert choice.text in ("yes", "no") and choice.finish_reason == "stop"


def test_answer_is_the_packages(client, flash):
    processor = mlx_flashhead.grammar_processor(flash[1], json_schema=SCHEMAS[0])
    prompt = flash[1].apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = mlx_flashhead.generate(*flash, prompt, max_tokens=60, logits_processors=[processor])
    choice = ask(client, schema_format(SCHEMAS[0]), max_tokens=60).choices[0]
    assert choice.message.content == expected
    choice = ask(client, schema_format(SCHEMAS[0]), max_tokens=3).choices[0]
    assert choice.finish_reason == "length"


def test_a_schema_that_no_text_fits_is_told(client):
    with pytest.raises(openai.BadRequestError, match="No text fits the JSON schema") as raised:
        ask(client, schema_format({"$ref": "#"}))
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
