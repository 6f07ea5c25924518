"""A loop of three turns that reads a file, edits it and says so: calls are valid, prompts kept."""

import json

import jsonschema
import pytest
from transformers import PreTrainedTokenizerFast

from engines import convert, flags, whole_answer
from mlx_flashhead.serving import messages, responses
from mlx_flashhead.serving.completions import read_calls
from mlx_flashhead.serving.jobs import read_jobs
from model_folders import VOCAB_SIZE, write_model

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for message in messages %}"
    "[{{ message.role }}] {{ message.content }}{% for call in message.tool_calls or [] %}"
    "{% set tool_call = call.function %}<tool_call>"
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}'
    "</tool_call>{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKS = ("<tool_call>", "</tool_call>")
# A state of convolutions beside keys and values: it cannot be cut.
CONVOLUTIONS = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
    "rope_theta": 10_000.0,
}
# The next prompt may lack so many tokens of a prompt.
AFTER_LANDMARK = 11


def schema(**properties):
    limits = {"type": "object", "additionalProperties": False, "required": [*properties]}
    return limits | {"properties": {name: {"enum": each} for name, each in properties.items()}}


SCHEMAS = {
    "read": schema(path=["a.py"]),
    "edit": schema(path=["a.py"], old=["hello"], new=["goodbye", "good evening"]),
}


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def folder(request, tmp_path_factory):
    """A random model whose template has tools: with keys and values, or with states too."""
    dense = tmp_path_factory.mktemp(request.param) / "dense"
    further = {"max_position_embeddings": 4096}
    if request.param == "lfm2":
        further |= CONVOLUTIONS
    size = VOCAB_SIZE + len(MARKS)
    options = {"vocab_size": size, "chat_template": TEMPLATE, "further": further}
    write_model(dense, arch=request.param, **options)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense)
    tokenizer.add_tokens([*MARKS])
    tokenizer.save_pretrained(dense)
    return convert(dense, "flash", n_probes=4)


def use(path, calls):
    """What the tools say, and the file's text after them."""
    results = []
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, SCHEMAS[call["function"]["name"]])
        text = path.read_text()
        if call["function"]["name"] == "edit":
            path.write_text(text.replace(arguments["old"], arguments["new"]))
            text = "edited"
        results.append(text)
    return results


class Messages:
    """A client of Anthropic's messages."""

    def __init__(self):
        self.turns = [{"role": "user", "content": "Change hello to goodbye in a.py"}]

    def fields(self, tool):
        tools = [{"name": name, "input_schema": SCHEMAS[name]} for name in SCHEMAS]
        if tool is None:
            choice = {"type": "auto"}
        else:
            choice = {"type": "tool", "name": tool, "disable_parallel_tool_use": True}
        body = {"messages": self.turns, "system": "Be brief.", "tools": tools}
        return messages.chat_fields(body | {"tool_choice": choice})

    def add(self, jobs, token, results):
        answer = messages.MessageAnswer(jobs, {})
        answer.add(0, token)
        blocks = answer.whole()["content"]
        uses = [block for block in blocks if block["type"] == "tool_use"]
        told = [
            {"type": "tool_result", "tool_use_id": use["id"], "content": text}
            for use, text in zip(uses, results, strict=True)
        ]
        self.turns += [{"role": "assistant", "content": blocks}, {"role": "user", "content": told}]


class Responses:
    """A client of OpenAI's responses."""

    def __init__(self):
        self.items = [{"role": "user", "content": "Change hello to goodbye in a.py"}]

    def fields(self, tool):
        tools = [
            {"type": "function", "name": name, "parameters": SCHEMAS[name]} for name in SCHEMAS
        ]
        choice = "auto" if tool is None else {"type": "function", "name": tool}
        body = {"input": self.items, "instructions": "Be brief.", "tools": tools}
        return responses.chat_fields(body | {"tool_choice": choice, "parallel_tool_calls": False})

    def add(self, jobs, token, results):
        answer = responses.ResponseAnswer(jobs, {})
        answer.add(0, token)
        calls = answer.whole()["output"]
        told = [
            {"type": "function_call_output", "call_id": call["call_id"], "output": text}
            for call, text in zip(calls, results, strict=True)
        ]
        self.items += [*calls, *told]


@pytest.mark.parametrize("client", [Messages, Responses])
def test_a_file_is_edited_and_only_what_is_new_is_read(start_engine, folder, tmp_path, client):
    path = tmp_path / "a.py"
    path.write_text('print("hello")\n')
    client = client()
    last = 0
    with start_engine(folder=folder) as engine:
        (served,) = engine.models.result()
        assert served.cuttable == ("llama" in str(folder))
        for tool, max_tokens, called in (
            ("read", 200, ["read"]),
            ("edit", 200, ["edit"]),
            (None, 5, []),
        ):
            fields = client.fields(tool) | {"max_tokens": max_tokens}
            jobs = read_jobs(fields, chat=True, models=[served], flags=flags())
            engine.submit(jobs)
            answer = whole_answer(jobs[0])
            assert jobs[0].cached >= max(0, last - AFTER_LANDMARK)
            last = len(jobs[0].prompt.tokens)
            answer.calls = [
                call for text in answer.calls for call in read_calls(jobs[0].request, text)
            ]
            assert [call["function"]["name"] for call in answer.calls] == called
            if called:
                client.add(jobs, answer, use(path, answer.calls))
    assert path.read_text() in ('print("goodbye")\n', 'print("good evening")\n')
