"""Anthropic's messages: requests become those of chats, answers blocks, and its SDK reads them."""

import anthropic
import pytest

from engines import checked
from mlx_flashhead.serving.answer_text import Token
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.jobs import Job
from mlx_flashhead.serving.messages import MessageAnswer, chat_fields
from mlx_flashhead.serving.prompts import Prompt

USER = {"role": "user", "content": "One day"}
MESSAGES = [USER]
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "limit": {"type": "integer"}}}
WEATHER = {"name": "weather", "description": "Of a city.", "input_schema": CITY}
CACHED = {"cache_control": {"type": "ephemeral"}}


def text(words):
    return {"type": "text", "text": words}


def translated(**fields):
    return chat_fields({"messages": MESSAGES} | fields)


def test_turns_of_blocks_are_messages_of_a_chat():
    billing = text("x-anthropic-billing-header: cc_version=1.2.3; cch=9f;")
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("sun"), text("rain")]}
    other = {"type": "tool_result", "tool_use_id": "t2", "is_error": True}
    messages = [
        {"role": "user", "content": [text("a") | CACHED, text("b")]},
        {"role": "system", "content": "Remember."},
        {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}]},
        {"role": "assistant", "content": [text("Yes."), use]},
        {"role": "user", "content": [result | CACHED, other, text("c")]},
    ]
    found = translated(messages=messages, system=[billing, text("Be brief.") | CACHED])["messages"]
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    call = {"id": "t1", "type": "function", "function": function}
    assistant = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert found == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\n\nb\n\nRemember."},
        assistant | {"tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "sun\n\nrain", "name": "weather"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": "c"},
    ]


def test_fields_have_the_names_of_chats():
    fields = {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stream": True}
    fields |= {"model": "claude", "metadata": {"user_id": "x"}, "n_probes": 3}
    form = {"type": "json_schema", "schema": CITY}
    output = {"effort": "high", "format": form}
    chat = translated(
        **fields,
        stop_sequences=["x"],
        tools=[WEATHER | CACHED, {"name": "ping", "type": "custom", "input_schema": {}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "adaptive"},
        output_config=output,
        context_management=None,
    )
    function = {"name": "weather", "parameters": CITY, "description": "Of a city."}
    ping = {"name": "ping", "parameters": {}}
    assert chat == fields | {
        "messages": MESSAGES,
        "stop": ["x"],
        "tools": [{"type": "function", "function": each} for each in (function, ping)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "enable_thinking": True,
        "reasoning_effort": "high",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": CITY},
        },
    }
    assert translated(thinking={"type": "disabled", "budget_tokens": 5})["enable_thinking"] is False
    for choice, expected in (("auto", "auto"), ("none", "none")):
        assert translated(tool_choice={"type": choice})["tool_choice"] == expected
    one = translated(tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    assert one["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content", "text only"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}
                        ],
                    }
                ]
            },
            "messages[0].content",
            'content[0].content[0] is "image": this model takes text only',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "song"}]}]},
            "messages[0].content",
            'content[0].type is "song": it must be "text" or "thinking" or',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content",
            "content[0].tool_use_id is missing: it must be a text",
        ),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", '"user" or "assist'),
        ({"messages": []}, "messages", "a list of 1 to 4,096"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "have no content: send a t"),
        ({"messages": [USER, {"role": "assistant", "content": "{"}]}, "messages", "not continued"),
        ({"system": [{"type": "text"}]}, "system", "system[0].text is missing"),
        ({"max_tokens": 0}, "max_tokens", "1 to 2147483647"),
        ({"stop_sequences": "x"}, "stop_sequences", "a list of at most 16 texts"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools", "tools[0] is bash_2025"),
        (
            {"tools": [{"name": "f", "input_schema": 5}]},
            "tools",
            "input_schema is 5: it must be an",
        ),
        ({"tool_choice": "auto"}, "tool_choice", 'must be an object such as {"type": "auto"}'),
        ({"thinking": {"type": "yes"}}, "thinking", '"enabled" or "adaptive" or "disabled"'),
        ({"mcp_servers": [{}]}, "mcp_servers", "leave it out"),
        ({"n": 2}, "n", "a field of chat completions"),
        ({"logprobs": True}, "logprobs", "a field of chat completions"),
    ],
)
def test_mistakes_name_the_field(fields, field, said):
    with pytest.raises(ApiError) as refused:
        translated(**fields)
    assert refused.value.field == field and said in str(refused.value)


def test_thinking_and_tools_need_a_template_that_knows_them(tiny, chain, monkeypatch):
    thinking = chat_fields({"messages": MESSAGES, "thinking": {"type": "enabled"}})
    request = checked(tiny, thinking)
    assert request.template_settings == {} and "enable_thinking" in request.ignored
    monkeypatch.setattr(tiny, "template_settings", frozenset({"enable_thinking"}))
    assert checked(tiny, thinking).template_settings == {"enable_thinking": True}
    tools = chat_fields({"messages": MESSAGES, "tools": [WEATHER]})
    assert checked(chain, tools).tools.offered
    with pytest.raises(ApiError, match="template knows no tools: leave them out"):
        checked(tiny, tools)


def checked_events(served, tokens):
    """The events of an answer with these tokens, and the whole of it, which is complete."""
    job = Job(checked(served, {"messages": MESSAGES}), Prompt([5] * 30), cached=20)
    answer = MessageAnswer([job], {})
    events = answer.begin()
    for token in tokens:
        job.tokens.append(7)
        events += answer.add(0, token)
    assert answer.is_complete
    return [*events, *answer.end()], answer.whole()


def test_blocks_follow_each_other(tiny):
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Rome"}'}
    tokens = [
        Token(reasoning="\n"),
        Token(reasoning="Hm."),
        Token(reasoning="\n"),
        Token("\n\n"),
        Token("A"),
        Token(" b"),
        Token("\n"),
        Token(calls=[call]),
        Token("\n", finish_reason="stop"),
    ]
    events, whole = checked_events(tiny, tokens)
    assert [event.name for event in events] == [event.data["type"] for event in events]
    shown = []
    for event in events:
        kind = event.data["type"]
        delta = event.data.get("delta", {})
        shown.append((kind.removeprefix("content_block_"), delta.get("type")))
    block = ("start", None), ("stop", None)
    assert shown == [
        ("message_start", None),
        block[0],
        *[("delta", "thinking_delta")] * 2,
        ("delta", "signature_delta"),
        block[1],
        block[0],
        *[("delta", "text_delta")] * 3,
        block[1],
        block[0],
        ("delta", "input_json_delta"),
        block[1],
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert [event.data["index"] for event in events if "index" in event.data] == [
        *[0] * 5,
        *[1] * 5,
        *[2] * 3,
    ]
    assert whole["content"] == [
        {"type": "thinking", "thinking": "\nHm.\n", "signature": ""},
        {"type": "text", "text": "\n\nA b\n"},
        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}},
    ]
    assert whole["stop_reason"] == events[-2].data["delta"]["stop_reason"] == "tool_use"
    usage = {"input_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 20}
    assert events[0].data["message"]["usage"] == usage | {"output_tokens": 0}
    assert whole["usage"] == events[-2].data["usage"] == usage | {"output_tokens": 9}


@pytest.mark.parametrize(
    "token, reason, stop",
    [
        (Token("a", finish_reason="stop"), "end_turn", None),
        (Token("a", finish_reason="length"), "max_tokens", None),
        (Token("a", finish_reason="stop", stop_text="wo"), "stop_sequence", "wo"),
    ],
)
def test_reasons_of_the_end(tiny, token, reason, stop):
    _, whole = checked_events(tiny, [token])
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop)


@pytest.fixture(scope="session")
def client(http_server):
    """Anthropic's client of the server. It sends the token as its key."""
    return anthropic.Anthropic(
        base_url=http_server.url, api_key=http_server.token, max_retries=0, timeout=60
    )


def test_anthropics_client_gets_the_text_of_a_chat(client, http_server):
    fields = {"model": "mine", "messages": MESSAGES, "max_tokens": 12}
    chat = http_server.client().chat.completions.create(**fields).choices[0].message.content
    message = client.messages.create(**fields)
    assert message.content[0].text == chat and message.stop_reason == "max_tokens"
    with client.messages.stream(**fields) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert streamed == final.content[0].text == chat
    n_read = final.usage.input_tokens + final.usage.cache_read_input_tokens
    counted = client.messages.count_tokens(model="mine", messages=MESSAGES)
    assert counted.input_tokens == n_read and final.usage.cache_read_input_tokens > 0
    stopped = client.messages.create(**fields | {"stop_sequences": ["y", chat[3:5]]})
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", chat[3:5])


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_gets_calls_and_sends_their_results(client, stream):
    fields = {"model": "chain", "max_tokens": 30, "tools": [WEATHER]}
    messages = list(MESSAGES)
    for _ in range(2):
        with client.messages.stream(messages=messages, **fields) as events:
            answer = events.get_final_message()
        if not stream:
            answer = client.messages.create(messages=messages, **fields)
        (use,) = answer.content
        assert (use.name, use.input) == ("weather", {"city": "Rome", "limit": 5})
        assert answer.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
        messages += [{"role": "assistant", "content": answer.content}]
        messages += [{"role": "user", "content": [result]}]


# The client does not know a temperature any more.
TOO_HOT = {"extra_body": {"temperature": 5}}


def test_errors_have_anthropics_shape(client, http_server):
    fields = {"model": "mine", "messages": MESSAGES, "max_tokens": 5}
    refusals = (
        (anthropic.NotFoundError, "not_found_error", {"model": "claude-sonnet"}, "choose mine or"),
        (anthropic.BadRequestError, "invalid_request_error", TOO_HOT, "0 to 2"),
        (
            anthropic.BadRequestError,
            "invalid_request_error",
            {"system": "a" * 600},
            "Prompt is too long. The prompt is longer than this model's 512-token context",
        ),
    )
    for kind, name, further, said in refusals:
        with pytest.raises(kind, match=said) as refused:
            client.messages.create(**fields | further)
        assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"] == name
    config = {"format": {"type": "json_schema", "schema": {"type": "x"}}}
    said = "^Error code: 400.*output_config.format.schema: The JSON schema is wrong"
    with pytest.raises(anthropic.BadRequestError, match=said):
        client.messages.create(**fields, output_config=config)
    stranger = anthropic.Anthropic(base_url=http_server.url, api_key="x", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="X-Api-Key"):
        stranger.messages.create(**fields)


def test_any_name_stands_for_the_only_model(tiny, chain):
    body = {"messages": MESSAGES, "model": "claude-haiku"}
    assert checked(tiny, body, any_model=True).served is tiny
    for options in ({}, {"any_model": True, "further": [chain]}):
        with pytest.raises(ApiError, match="No model of that name"):
            checked(tiny, body, **options)
    assert checked(tiny, body, arguments=["--any-model"], further=[chain]).served is tiny
