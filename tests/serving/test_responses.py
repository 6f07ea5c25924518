"""OpenAI's responses: requests become those of chats, answers items, and its SDKs read them."""

import asyncio
import json

import agents
import openai
import pytest

from engines import checked
from mlx_flashhead.serving.answer_text import Token
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.jobs import Job
from mlx_flashhead.serving.prompts import Prompt
from mlx_flashhead.serving.responses import ResponseAnswer, chat_fields

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "limit": {"type": "integer"}}}
WEATHER = {"type": "function", "name": "weather", "parameters": CITY, "strict": False}
SPAWN = {"type": "function", "name": "spawn", "description": "Starts.", "parameters": None}
NAMESPACE = {"type": "namespace", "name": "crew", "description": "x", "tools": [SPAWN]}
CALL = {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "c1"}
CALL |= {"name": "spawn", "namespace": "crew", "arguments": '{"a": 1}'}


def translated(**fields):
    return chat_fields({"input": "One day"} | fields)


def part(words, kind="input_text"):
    return {"type": kind, "text": words}


def test_items_are_messages_of_a_chat():
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": []}
    items = [
        {"type": "message", "id": "m", "role": "developer", "content": [part("a"), part("b")]},
        {"role": "system", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "developer", "content": "e"},
        reasoning | {"content": [part("Hm.", "reasoning_text")], "encrypted_content": "no"},
        reasoning | {"encrypted_content": " Yes."},
        reasoning | {"summary": [part(" So.", "summary_text")]},
        {"role": "assistant", "content": [part("f", "output_text")], "phase": "commentary"},
        CALL,
        {"type": "function_call_output", "call_id": "c1", "output": [part("g"), part("h")]},
        {"type": "function_call_output", "call_id": "c2", "output": "i"},
    ]
    function = {"name": "crew__spawn", "arguments": {"a": 1}}
    call = {"id": "c1", "type": "function", "function": function}
    assistant = {"role": "assistant", "content": "f", "reasoning_content": "Hm. Yes. So."}
    assert translated(input=items, instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief.\n\na\n\nb\n\nc"},
        {"role": "user", "content": "d\n\ne"},
        assistant | {"tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "g\n\nh", "name": "crew__spawn"},
        {"role": "tool", "tool_call_id": "c2", "content": "i"},
    ]
    assert translated()["messages"] == [{"role": "user", "content": "One day"}]


def test_fields_have_the_names_of_chats():
    same = {"temperature": 0.5, "top_p": 0.9, "stream": True, "model": "gpt", "tool_choice": "auto"}
    same |= {"parallel_tool_calls": True, "store": False, "metadata": {}, "n_probes": 3}
    form = {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}
    chat = translated(
        **same,
        max_output_tokens=9,
        text={"format": form, "verbosity": "low"},
        reasoning={"effort": "none", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        tools=[WEATHER, NAMESPACE, {"type": "web_search", "external_web_access": False}],
        truncation="auto",
        previous_response_id=None,
        background=False,
    )
    spawn = {"name": "crew__spawn", "parameters": {}, "description": "Starts."}
    functions = ({"name": "weather", "parameters": CITY}, spawn)
    assert chat == same | {
        "messages": [{"role": "user", "content": "One day"}],
        "max_tokens": 9,
        "tools": [{"type": "function", "function": each} for each in functions],
        "verbosity": "low",
        "reasoning_effort": "none",
        "enable_thinking": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": CITY},
        },
    }
    assert translated(text={"format": {"type": "text"}})["response_format"] == {"type": "text"}


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"input": None}, "input", "input is missing"),
        ({"input": []}, "input", "a list of 1 to 4,096 items"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input[0].type",
            '"item_reference": it must be "message" or "reasoning" or "function_call"',
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
            'input[0].content[0] is "input_image": this model takes text only',
        ),
        ({"input": [{"role": "robot", "content": ""}]}, "input[0].role", '"user" or "assistant"'),
        (
            {"input": [{"role": "user", "content": "a"}, CALL | {"arguments": '{"a": '}]},
            "input[1]",
            "input[1] must have arguments in JSON, but Input data was truncated.",
        ),
        ({"input": [CALL | {"arguments": "[" * 50_001}]}, None, "members of objects"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"background": True}, "background", "in its own response"),
        ({"include": ["message.output_text.logprobs"]}, "include", "asks for logprobs"),
        ({"truncation": "middle"}, "truncation", '"disabled" or "auto"'),
        ({"max_output_tokens": 0}, "max_output_tokens", "1 to 2147483647"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", 'send "schema" with it'),
        *(
            ({"tools": [{"type": kind}]}, "tools", f'"{kind}" is a tool that this server does not')
            for kind in ("web_search", "file_search", "mcp", "custom", "local_shell")
        ),
        ({"tools": [{"type": "function"}]}, "tools", "a function has no name: send"),
        ({"tools": [NAMESPACE | {"tools": [NAMESPACE]}]}, "tools", '"namespace" is a tool that'),
    ],
)
def test_mistakes_name_the_field(fields, field, said):
    with pytest.raises(ApiError) as refused:
        translated(**fields)
    assert refused.value.field == field and said in str(refused.value)


def checked_events(served, tokens, **body):
    """The events of an answer with these tokens, numbered and named, and the whole of it."""
    body = {"input": "One day"} | body
    request = checked(served, chat_fields(body), any_model=True)
    job = Job(request, Prompt([5] * 30), cached=20)
    answer = ResponseAnswer([job], body)
    events = answer.begin()
    for token in tokens:
        job.tokens.append(7)
        events += answer.add(0, token)
    assert answer.is_complete
    events += answer.end()
    assert [event.data["sequence_number"] for event in events] == [*range(len(events))]
    assert [event.name for event in events] == [event.data["type"] for event in events]
    return events, answer.whole()


def test_items_follow_each_other(chain):
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "crew__spawn", "arguments": "{}"}
    tokens = [Token(reasoning="Hm"), Token(reasoning="."), Token("\n"), Token("A"), Token(" b")]
    tokens += [Token(calls=[call, call]), Token(finish_reason="stop")]
    included = {"include": ["reasoning.encrypted_content"], "tools": [NAMESPACE]}
    events, whole = checked_events(chain, tokens, **included)
    called = [
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2),
        ("output_item.done", 2),
    ]
    assert [(e.name.removeprefix("response."), e.data.get("output_index")) for e in events] == [
        ("created", None),
        ("in_progress", None),
        ("output_item.added", 0),
        ("content_part.added", 0),
        *[("reasoning_text.delta", 0)] * 2,
        ("reasoning_text.done", 0),
        ("content_part.done", 0),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1),
        *[("output_text.delta", 1)] * 2,
        ("output_text.done", 1),
        ("content_part.done", 1),
        ("output_item.done", 1),
        *called,
        *[(name, 3) for name, _ in called],
        ("completed", None),
    ]
    thought, message, *calls = whole["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert thought["encrypted_content"] == "Hm."
    assert [p["text"] for p in message["content"]] == ["\nA b"]
    for item in calls:
        assert (item["namespace"], item["name"], item["arguments"]) == ("crew", "spawn", "{}")
        assert (item["call_id"], item["status"]) == ("c1", "completed")
    done = [event.data["item"] for event in events if event.name.endswith("item.done")]
    assert whole["output"] == done and events[-1].data["response"] == whole
    assert events[0].data["response"]["status"] == "in_progress"
    assert whole["usage"]["input_tokens_details"] == {"cached_tokens": 20}
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    # what it has said is read again
    items = [*whole["output"], {"type": "function_call_output", "call_id": "c1", "output": ""}]
    assistant, _ = translated(input=items)["messages"]
    assert assistant["reasoning_content"] == "Hm." and len(assistant["tool_calls"]) == 2


def test_an_answer_that_is_cut_or_fails_says_so(tiny):
    events, whole = checked_events(tiny, [Token("a", finish_reason="length")], max_output_tokens=1)
    assert events[-1].name == "response.incomplete" and whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in whole["output"]] == ["incomplete"]
    body = {"input": "x"}
    answer = ResponseAnswer([Job(checked(tiny, chat_fields(body)), Prompt([5]))], body)
    (event,) = answer.fail(ApiError("Too much.", code="context_length_exceeded"))
    assert event.name == "response.failed" and event.data["response"]["status"] == "failed"
    error = {"code": "context_length_exceeded", "message": "Too much."}
    assert event.data["response"]["error"] == error


@pytest.fixture(scope="session")
def client(http_server):
    return http_server.client()


def test_openais_client_gets_the_text_of_a_chat(client):
    messages = [{"role": "user", "content": "One day"}]
    chat = client.chat.completions.create(model="mine", messages=messages, max_tokens=12)
    text = chat.choices[0].message.content
    fields = {"model": "mine", "input": "One day", "max_output_tokens": 12}
    whole = client.responses.create(**fields)
    assert (whole.output_text, whole.status) == (text, "incomplete")
    with client.responses.stream(**fields) as stream:
        first, *_, last = stream
    assert (first.type, last.type) == ("response.created", "response.incomplete")
    assert last.response.output_text == text
    counted = client.responses.input_tokens.count(model="mine", input="One day")
    assert counted.input_tokens == whole.usage.input_tokens
    parsed = {"type": "json_schema", "name": "x", "schema": {"enum": [5]}, "strict": True}
    form = client.responses.create(**fields, text={"format": parsed})
    assert json.loads(form.output_text) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_gets_calls_and_sends_their_results(client, stream):
    items = [{"role": "user", "content": "One day"}]
    for _ in range(2):
        fields = {"model": "chain", "input": items, "tools": [WEATHER], "max_output_tokens": 30}
        if stream:
            *_, last = client.responses.create(stream=True, **fields)
            assert last.type == "response.completed"
            (call,) = last.response.output
        else:
            (call,) = client.responses.create(**fields).output
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome", "limit": 5})
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        items += [call.to_dict(), result]


def test_what_is_not_kept_or_not_served_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="send the whole conversation as input"):
        client.responses.create(model="mine", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="responses are not kept here"):
        client.responses.retrieve("resp_1")
    form = {"type": "json_schema", "name": "x", "schema": {"type": "x"}}
    with pytest.raises(openai.BadRequestError, match=r"text.format.schema: The JSON") as refused:
        client.responses.create(model="mine", input="x", text={"format": form})
    assert refused.value.param == "text.format"
    with pytest.raises(openai.NotFoundError, match="choose mine or model"):
        client.responses.create(model="gpt-5", input="x")


@agents.function_tool
def weather(city: str, limit: int) -> str:
    """The weather of a city."""
    asked.append((city, limit))
    return "sunny"


asked = []


@pytest.mark.parametrize("stream", [False, True])
def test_openais_agents_by_default(http_server, stream):
    """They speak responses, and run the tools themselves."""
    agents.set_tracing_disabled(disabled=True)
    client = openai.AsyncOpenAI(base_url=f"{http_server.url}/v1", api_key=http_server.token)
    model = agents.OpenAIResponsesModel("chain", client)
    agent = agents.Agent("Guide", "Be brief.", model=model, tools=[weather])
    asked.clear()

    async def run():
        if not stream:
            return await agents.Runner.run(agent, "One day", max_turns=2)
        streamed = agents.Runner.run_streamed(agent, "One day", max_turns=2)
        return [event async for event in streamed.stream_events()]

    # The model does nothing but call.
    with pytest.raises(agents.MaxTurnsExceeded):
        asyncio.run(run())
    assert asked == [("Rome", 5)] * 2
