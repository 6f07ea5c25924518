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
from server_process import serving

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


@pytest.fixture(scope="module", params=[(), ("--kv-bits", 8), ("--draft-model",)])
def client(request, random_model, tmp_path_factory):
    """OpenAI's client of a server that decodes batches, or one sequence after another."""
    further = request.param
    if further == ("--draft-model",):
        further += (random_model / "dense",)
    model = ("--model", random_model / "flash", "--served-model-name", "mine")
    with serving(tmp_path_factory.mktemp("server"), *model, *further) as server:
        yield server.client()


def ask(client, response_format=openai.NOT_GIVEN, **options):
    options = {"messages": MESSAGES, "max_tokens": 150} | options
    return client.chat.completions.create(model="mine", response_format=response_format, **options)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_schema(client, schema, stream):
    answer = ask(client, schema_format(schema), stream=stream, temperature=0.8, seed=3)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        finish = chunks[-1].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    if finish == "stop":
        jsonschema.validate(json.loads(text), schema)
    else:
        assert finish == "length" and schema is SCHEMAS[0]  # an integer may have many digits


def test_json_object(client):
    choice = ask(client, {"type": "json_object"}, logit_bias={"95": 30}).choices[0]  # "}"
    assert choice.finish_reason == "stop" and isinstance(json.loads(choice.message.content), dict)


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
    answer = client.completions.create(
        model="mine", prompt="One day", max_tokens=9, extra_body={"grammar": 'start: "yes" | "no"'}
    )
    assert answer.choices[0].text in ("yes", "no") and answer.choices[0].finish_reason == "stop"


def test_cut_answer_says_so(client):
    choice = ask(client, schema_format(SCHEMAS[0]), max_tokens=3).choices[0]
    assert choice.finish_reason == "length"


def test_answer_is_the_packages(client, random_model):
    model, tokenizer = mlx_flashhead.load(str(random_model / "flash"))
    processor = mlx_flashhead.grammar_processor(tokenizer, json_schema=SCHEMAS[0])
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = mlx_flashhead.generate(
        model, tokenizer, prompt, max_tokens=60, logits_processors=[processor]
    )
    assert (
        ask(client, schema_format(SCHEMAS[0]), max_tokens=60).choices[0].message.content == expected
    )


def test_schema_without_an_end_is_told(client):
    with pytest.raises(openai.BadRequestError, match="No text fits the JSON schema"):
        ask(client, schema_format({"$ref": "#"}))


def test_wrong_schema_is_told_with_its_place(client):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, schema_format({"properties": {"a": {"type": "strin"}}}))
    assert raised.value.param == "response_format"
    assert "/properties/a" in str(raised.value)


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
