"""What a request may hold: served as OpenAI's API has it, or refused by the field's name."""

import json

import mlx_lm
import pytest

from mlx_flashhead.serving.catalogue import ServedModel
from mlx_flashhead.serving.protocol.errors import Problem
from mlx_flashhead.serving.protocol.requests import MAX_CHOICES, MAX_LOGPROBS
from model_folders import VOCAB_SIZE
from served_models import checked, served_model

N_CLUSTERS = -(-VOCAB_SIZE // 16)
MESSAGES = [{"role": "user", "content": "One day"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def chat(served, **fields):
    return checked(served, {"messages": MESSAGES} | fields)


def text(served, **fields):
    return checked(served, {"prompt": "One day"} | fields, chat=False)


def calling(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


def test_defaults_are_the_flags(tiny):
    arguments = ("--temp", 0.5, "--top-p", 0.9, "--top-k", 7, "--min-p", 0.1, "--max-tokens", 9)
    request = checked(tiny, {"messages": MESSAGES}, arguments=arguments)
    found = [request.sampling[name] for name in ("temp", "top_p", "top_k", "min_p")]
    assert found == [0.5, 0.9, 7, 0.1]
    assert (request.max_tokens, request.n_probes, request.logprobs) == (9, None, None)
    assert request == checked(
        tiny, dict.fromkeys(FIELDS) | {"messages": MESSAGES}, arguments=arguments
    )


# every field that OpenAI's clients send for a chat, and ours; a null is as good as nothing
FIELDS = (
    *("model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "repetition_context_size", "presence_penalty", "frequency_penalty"),
    *("presence_context_size", "frequency_context_size", "logit_bias", "seed", "stop"),
    *("n_probes", "dense", "num_draft_tokens", "logprobs", "top_logprobs", "tools"),
    *("tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs", "store"),
    *("user", "metadata", "service_tier", "modalities", "safety_identifier", "no_such_field"),
)


def test_values_arrive(tiny):
    request = chat(
        tiny,
        model="tiny",
        stream=True,
        stream_options={"include_usage": True},
        n=3,
        max_completion_tokens=6,
        temperature=1,
        top_k=3,
        seed=-5,
        stop="x",
        logprobs=True,
        top_logprobs=MAX_LOGPROBS,
        logit_bias={"5": 1e30, "6": -1},
        frequency_penalty=0.5,
        user="me",
        metadata={"a": "b"},
        tool_choice="none",
        response_format={"type": "text"},
        store=False,
    )
    assert (request.stream, request.include_usage, request.n) == (True, True, 3)
    assert (request.max_tokens, request.seed, request.stop) == (6, -5, ("x",))
    assert (request.sampling["temp"], request.sampling["top_k"], request.logprobs) == (1.0, 3, 20)
    assert request.penalties["logit_bias"] == {5: 1e4, 6: -1.0}
    assert chat(tiny, logprobs=True).logprobs == 0
    assert text(tiny, logprobs=2).logprobs == 2
    assert chat(tiny, top_k=10**6).sampling["top_k"] == 0
    for least in ({"temperature": 1e-7}, {"temperature": 1, "top_p": 0}):
        assert chat(tiny, **least).sampling["temp"] == 0


@pytest.mark.parametrize(
    "fields, n_probes, dense",
    [
        ({}, None, False),
        ({"n_probes": 2}, 2, False),
        ({"dense": True}, None, True),
        ({"dense": False}, None, False),
    ],
)
def test_dense_and_the_number_of_probes(tiny, fields, n_probes, dense):
    request = chat(tiny, **fields)
    assert (request.n_probes, request.dense) == (n_probes, dense)


def test_a_dense_model_has_no_probes(random_model):
    model, tokenizer = mlx_lm.load(str(random_model / "dense"))
    served = ServedModel(("tiny",), model, tokenizer, None, 512)
    assert chat(served).n_probes is chat(served, dense=True).n_probes is None
    with pytest.raises(Problem, match="has no FlashHead: leave n_probes out"):
        chat(served, n_probes=2)


def test_a_server_that_is_dense_by_default(random_model):
    served = served_model(random_model / "flash", dense=True)
    assert chat(served).dense
    assert not chat(served, dense=False).dense
    assert not chat(served, n_probes=2).dense


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
    ],
)
def test_prompts_of_all_forms(tiny, prompt, prompts):
    assert text(tiny, prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"messages": "hello"}, "messages", "messages must be a list"),
        ({"messages": []}, "messages", "messages must be a list"),
        ({"messages": None}, "messages", "messages must be a list"),
        ({"messages": ["hello"]}, "messages[0]", "messages must be a list"),
        ({"messages": [{"content": "hello"}]}, "messages[0]", "messages must be a list"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "must be text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0]",
            "must be a text",
        ),
        (
            {"messages": [{"role": "assistant", "function_call": {}}]},
            "messages[0].function_call",
            "not read here",
        ),
        ({"messages": [{"role": "a", "tool_calls": {}}]}, "messages[0].tool_calls", "a list"),
        ({"messages": [{"role": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls", "a name"),
        (calling("{"), "messages[0].tool_calls", "must be JSON"),
        (calling("[" * 200_000), "messages[0].tool_calls", "nested too deeply"),
        (calling('{"a": "\\ud800"}'), "messages[0].tool_calls", "half of a character"),
        (calling('{"a": NaN}'), "messages[0].tool_calls", "NaN is not JSON"),
        ({"model": "gpt-4o"}, "model", "choose tiny"),
        ({"model": ""}, "model", "choose tiny"),
        ({"model": "/"}, "model", "choose tiny"),
        ({"model": 5}, "model", "must be a text"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": 1}, "stream_options", "must be an object"),
        ({"stream_options": {}}, "stream_options", "with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "x", "not a field"),
        ({"n": 0}, "n", "1 to 16"),
        ({"n": MAX_CHOICES + 1}, "n", "1 to 16"),
        ({"temperature": 2.1}, "temperature", "it must be 0 to 2"),
        ({"temperature": "1"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"top_p": 7}, "top_p", "it must be 0 to 1"),
        ({"xtc_threshold": 1}, "xtc_threshold", "it must be 0 to 0.5"),
        ({"repetition_penalty": -1}, "repetition_penalty", "at least 0"),
        ({"presence_penalty": 10**400}, "presence_penalty", "is 1000"),
        ({"logit_bias": {"5": None}}, "logit_bias", "give each token id a number"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"logit_bias": {"x": 1}}, "logit_bias", f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"max_tokens": 0}, "max_tokens", "1 to 2147483647"),
        ({"max_tokens": 10**30}, "max_tokens", "1 to 2147483647"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "whole number"),
        ({"n_probes": 0}, "n_probes", f"1 to {N_CLUSTERS}"),
        ({"n_probes": 2.5}, "n_probes", "n_probes is 2.5"),
        ({"n_probes": N_CLUSTERS + 1}, "n_probes", f"1 to {N_CLUSTERS}"),
        ({"dense": 1}, "dense", "true or false"),
        ({"dense": True, "n_probes": 3}, "n_probes", "leave n_probes out"),
        ({"stop": ""}, "stop", "stop must be"),
        ({"stop": [1]}, "stop", "stop must be"),
        ({"stop": {}}, "stop", "stop must be"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"seed": 2**64}, "seed", "whole number"),
        ({"logprobs": 5}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"tools": {}}, "tools", "must be a list"),
        ({"tools": [TOOL]}, "tools", "knows no tools"),
        ({"tools": [{}]}, "tools", "tools[0] must be"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "with a name"),
        ({"tool_choice": "required"}, "tool_choice", "cannot be forced"),
        ({"tool_choice": TOOL}, "tool_choice", "cannot be forced"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "leave it out"),
        ({"response_format": "json"}, "response_format", "must be"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "must be an object"),
        ({"functions": []}, "functions", "not a field"),
        ({"adapters": "/"}, "adapters", "when the server is started"),
        ({"draft_model": "/"}, "draft_model", "when the server is started"),
        ({"role_mapping": {}}, "role_mapping", "not a field"),
        ({"modalities": ["audio"]}, "modalities", "text"),
        ({"store": True}, "store", "nothing is stored"),
        ({"service_tier": "flex"}, "service_tier", "one tier"),
        ({"prompt": "a"}, "prompt", "not a field"),
        ({"\ud800" * 100: 1}, "\ud800" * 80, "not a field"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_mistakes_in_chats_name_the_field(tiny, fields, field, said):
    with pytest.raises(Problem) as told:
        chat(tiny, **fields)
    assert told.value.field == field
    assert said in str(told.value)
    assert "\n" not in str(told.value) and len(str(told.value)) < 200
    assert told.value.status == (404 if field == "model" and fields["model"] != 5 else 400)


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"prompt": None}, "prompt", "prompt must be"),
        ({"prompt": []}, "prompt", "prompt must be"),
        ({"prompt": {}}, "prompt", "prompt must be"),
        ({"prompt": ["a", 5]}, "prompt", "prompt must be"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be"),
        ({"prompt": [True]}, "prompt", "prompt must be"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"prompt": [-1]}, "prompt", f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"prompt": ["a"] * 9, "n": 2}, "n", "is 18: at most 16"),
        ({"logprobs": True}, "logprobs", "0 to 20"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "not a field"),
        ({"echo": True}, "echo", "not repeated"),
        ({"suffix": "b"}, "suffix", "to its end alone"),
        ({"best_of": 2}, "best_of", "not compared"),
        ({"messages": MESSAGES}, "messages", "not a field"),
        ({"tools": []}, "tools", "not a field"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_mistakes_in_texts_name_the_field(tiny, fields, field, said):
    with pytest.raises(Problem) as told:
        text(tiny, **fields)
    assert (told.value.field, told.value.status) == (field, 400)
    assert said in str(told.value)


def test_contents_in_parts_and_calls_become_what_templates_take(tiny):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    first, second = chat(tiny, messages=messages).messages
    assert (first["content"], second["content"]) == ("ab", "")
    assert second["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"]["arguments"] == '{"a": 1}'


def test_tools_go_to_a_model_that_knows_them(chain):
    assert chat(chain, tools=[TOOL]).tools == [TOOL]
    assert chat(chain, tools=[TOOL], tool_choice="none").tools == []
