"""The server in a process of its own, driven by OpenAI's client."""

import json
import urllib.error
import urllib.request

import mlx.core as mx
import openai
import pytest

import mlx_flashhead
from mlx_flashhead.serving.bodies import read_json

MESSAGES = [{"role": "user", "content": "One day"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TOKENS = 12


@pytest.fixture(scope="session")
def client(http_server):
    """OpenAI's client of it."""
    return http_server.client()


def chat(client, model="mine", **options):
    options = {"messages": MESSAGES, "max_tokens": TOKENS} | options
    return client.chat.completions.create(model=model, **options)


def complete(client, prompt="One day", model="mine", **options):
    return client.completions.create(model=model, prompt=prompt, **{"max_tokens": TOKENS} | options)


def generated(flash, prompt="One day", **options):
    """The same by the package."""
    return mlx_flashhead.generate(*flash, prompt, **{"max_tokens": TOKENS} | options)


def request(server, path, body=None):
    """(status, JSON) of any request; a body is bytes, or what becomes JSON."""
    headers = {"Authorization": f"Bearer {server.token}"}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    asked = urllib.request.Request(server.url + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, read_json(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, read_json(error.read())


def chosen(answer, stream):
    """The choices of a whole answer, or of all chunks, and the messages or deltas in them."""
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        return choices, [choice.delta for choice in choices]
    return answer.choices, [choice.message for choice in answer.choices]


def texts_of(answer, stream, n):
    """The texts of n answers, and the reasons why they ended."""
    texts = [""] * n
    ends = []
    for choice, part in zip(*chosen(answer, stream), strict=True):
        if part.content is not None:
            texts[choice.index] += part.content
        if choice.finish_reason is not None:
            ends.append(choice.finish_reason)
    return texts, ends


def test_chat_is_what_the_package_generates_whole_and_in_chunks(client, flash):
    prompt = flash[1].apply_chat_template(MESSAGES, add_generation_prompt=True)
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert texts_of(answer, False, 1) == ([generated(flash, prompt)], ["length"])
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 4 and texts_of(chunks, True, 1) == texts_of(answer, False, 1)
    for usage in (answer.usage, chunks[-1].usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), TOKENS)


def test_spaces_at_the_beginning_stay(client):
    """mlx-lm's detokenizer drops one, which a chat without a form has for its template's sake."""
    answer = complete(client, "a", "chain", logprobs=0).choices[0]
    assert answer.text == " one two three four"
    places = zip(answer.logprobs.tokens, answer.logprobs.text_offset, strict=True)
    assert all(answer.text.startswith(token, offset) for token, offset in places)
    answer = complete(client, "a", "chain", stop=["x", "wo th"]).choices[0]
    # A stop text is found within tokens.
    assert (answer.text, answer.finish_reason) == (" one t", "stop")
    form = {"regex": " one( two)?"}
    content = chat(client, model="chain", extra_body=form).choices[0].message.content
    assert content.startswith(" one")


def test_logprobs_of_a_text_are_the_models(client, flash):
    responses = list(mlx_flashhead.stream_generate(*flash, "One day", max_tokens=TOKENS))
    found = complete(client, logprobs=4).choices[0].logprobs
    assert len(found.tokens) == len(found.text_offset) == TOKENS
    for i, response in enumerate(responses):
        expected = mx.sort(response.logprobs)[::-1][:4].tolist()
        assert [*found.top_logprobs[i].values()] == pytest.approx(expected, abs=1e-4)
        assert found.token_logprobs[i] == found.top_logprobs[i][found.tokens[i]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.5, "seed": 3}])
def test_logprobs_of_a_chat_are_those_of_the_tokens_that_were_drawn(client, stream, drawn):
    answer = chat(client, logprobs=True, top_logprobs=2, stream=stream, **drawn)
    choices, parts = chosen(answer, stream)
    content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    # Each token has an entry.
    assert len(content) == TOKENS
    found = bytes(byte for entry in content for byte in entry.bytes)
    text = "".join(part.content for part in parts if part.content is not None)
    assert found.decode("utf-8", "replace") == text
    likely = []
    for entry in content:
        assert entry.token == bytes(entry.bytes).decode("utf-8", "replace")
        tops = {tuple(top.bytes): top.logprob for top in entry.top_logprobs}
        assert len(tops) == 2 and [*tops.values()] == sorted(tops.values(), reverse=True)
        assert tops.get((*entry.bytes,), entry.logprob) == entry.logprob <= max(tops.values())
        likely.append((*entry.bytes,) in tops)
    assert all(likely) != bool(drawn)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_with_valid_json_and_their_answer_is_read(client, stream):
    answer = chat(client, model="chain", tools=TOOLS, stream=stream)
    choices, parts = chosen(answer, stream)
    (call,) = [call for part in parts if part.tool_calls for call in part.tool_calls]
    assert (call.function.name, choices[-1].finish_reason) == ("weather", "tool_calls")
    assert read_json(call.function.arguments.encode()) == {"city": "Rome", "limit": 5}
    made = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    messages = [*MESSAGES, {"role": "assistant", "tool_calls": [made]}, result]
    answer = chat(client, model="chain", tools=TOOLS, messages=messages)
    assert answer.choices[0].message.tool_calls


def test_models_have_names_and_no_paths(http_server, client, dense):
    names = [model.id for model in client.models.list().data]
    assert names == ["mine", "model", "chain"]
    # "model" is the first one's other name.
    for name, answering in (("mine", "mine"), ("model", "mine"), ("chain", "chain")):
        assert client.models.retrieve(name).id == name
        assert chat(client, model=name, max_tokens=1).model == answering
    with pytest.raises(openai.NotFoundError, match="choose mine or model"):
        client.models.retrieve("/etc")
    asked = ({"model": name} for name in ("/no/such", str(dense)))
    absent, present = [request(http_server, "/v1/completions", body) for body in asked]
    # It is not said which folders there are.
    assert absent == present
    first, second = request(http_server, "/page/info.json")[1]["models"]
    known = {"name": "mine", "dense": False, "decoding": "verified", "flash_head": "verified"}
    assert (first, second["name"]) == (known | {"n_probes": 4, "context": 512}, "chain")


def test_several_answers_and_prompts(client, flash):
    answer = complete(client, ["One day", "x"], n=2)
    expected = [generated(flash, prompt) for prompt in ("One day", "x") for _ in range(2)]
    assert [(c.index, c.text) for c in answer.choices] == [*enumerate(expected)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 4 * TOKENS)
    drawn = {"n": 3, "temperature": 1.0, "seed": 5}
    texts = texts_of(chat(client, stream=True, **drawn), True, 3)
    assert len(set(texts[0])) == 3
    assert texts_of(chat(client, **drawn), False, 3) == texts


SCHEMA = {"type": "object", "required": ["name", "on"], "additionalProperties": False}
SCHEMA["properties"] = {"name": {"type": "string", "maxLength": 6}, "on": {"type": "boolean"}}


def test_two_answers_of_a_form_are_the_packages(client, flash):
    processor = mlx_flashhead.grammar_processor(flash[1], json_schema=SCHEMA)
    prompt = flash[1].apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = generated(flash, prompt, max_tokens=60, logits_processors=[processor])
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    for stream in (False, True):
        answer = chat(client, response_format=form, max_tokens=60, stream=stream, n=2)
        assert texts_of(answer, stream, 2) == ([expected] * 2, ["stop"] * 2)
    assert json.loads(expected).keys() == {"name", "on"}


CHAT = {"messages": MESSAGES}
FITS_NOTHING = {"name": "x", "schema": {"$ref": "#"}}
NO_TEXT = {"response_format": {"type": "json_schema", "json_schema": FITS_NOTHING}}


@pytest.mark.parametrize(
    "path, body, status, field, said",
    [
        ("/chat/completions", CHAT | {"stream": True, "seed": "a"}, 400, "seed", "whole number"),
        ("/v1/chat/completions", CHAT | {"model": "./absent"}, 404, "model", "choose mine"),
        ("/v1/completions", {"prompt": "a" * 600}, 400, "prompt", "longer than this model"),
        ("/v1/chat/completions", CHAT | NO_TEXT, 400, "response_format", "no text fits it"),
        ("/v1/completions", b"{", 400, None, "The body is not JSON"),
        ("/v1/completions", b"[]", 400, None, "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_have_openais_shape(http_server, path, body, status, field, said):
    """Each kind once: test_requests.py and test_prompts.py have the rest."""
    found, answer = request(http_server, path, body)
    error = answer["error"]
    assert (found, error["type"], error["param"]) == (status, "invalid_request_error", field)
    assert {*error} == {"message", "type", "param", "code"} and said in error["message"]


def test_health_says_what_is_used_and_the_log_has_no_prompt(http_server, client):
    """After an answer, one whose client leaves, and a mistake the server is as it was."""
    n_lines = len(http_server.log().splitlines())
    chat(client)
    with chat(client, stream=True, max_tokens=400) as leaves:
        next(iter(leaves))
    assert request(http_server, "/v1/completions", {"prompt": "One day", "n": 0})[0] == 400
    verified = {"mine": "verified", "chain": "verified"}
    assert request(http_server, "/health") == (200, {"status": "ok", "decoding": verified})
    logged = http_server.lines(3, n_lines)
    assert len(logged) >= 3
    assert not [word for word in ("One day", "Traceback") if word in http_server.log()]
