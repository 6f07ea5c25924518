"""The server in a process of its own, driven by OpenAI's client."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import openai
import pytest

import mlx_flashhead
from mlx_flashhead.serving.endpoints import _Answer
from mlx_flashhead.serving.protocol.logprobs import TokenNames
from model_folders import VOCAB_SIZE
from server_process import serving

MESSAGES = [{"role": "user", "content": "One day"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
N_CLUSTERS = -(-VOCAB_SIZE // 16)
TOKENS = 12
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def server(random_model, chain_model, tmp_path_factory):
    """A server of the random model; another one is allowed by name."""
    with serving(
        tmp_path_factory.mktemp("server"),
        *("--model", random_model / "flash", "--served-model-name", "mine"),
        *("--allow-models", chain_model),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def chat(client, model="mine", **options):
    options = {"messages": MESSAGES, "max_tokens": TOKENS} | options
    return client.chat.completions.create(model=model, **options)


def complete(client, prompt="One day", model="mine", **options):
    """The text of a completion."""
    options = {"max_tokens": TOKENS, "extra_body": options.pop("extra", None)} | options
    return client.completions.create(model=model, prompt=prompt, **options).choices[0].text


def generated(flash, prompt="One day", **options):
    """The same by the package."""
    return mlx_flashhead.generate(*flash, prompt, max_tokens=TOKENS, **options)


def post(server, body, path="/v1/chat/completions", **headers):
    """(status, JSON) of any request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, strict(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, strict(error.read())


def strict(text):
    """Reads JSON, in which NaN and Infinity are not allowed."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {text}")

    return json.loads(text, parse_constant=refuse)


def test_chat_is_what_the_package_generates(client, flash):
    prompt = flash[1].apply_chat_template(MESSAGES, add_generation_prompt=True)
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == generated(flash, prompt)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == TOKENS
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", ["One day", "x", "How do I bake bread?"])
def test_completion_is_what_the_package_generates(client, flash, prompt):
    assert complete(client, prompt) == generated(flash, prompt)


@pytest.mark.parametrize("options", [{}, {"seed": 1}])
def test_a_text_is_continued(client, flash, options):
    """The prompt is all that the server has in its cache of the first request."""
    model = "chain"
    first = complete(client, "a", model=model, max_tokens=2, **options)
    assert first == " one two"
    assert complete(client, f"a{first}", model=model, **options) == " three four"


def test_spaces_at_the_beginning_are_kept(client):
    """mlx-lm's detokenizer drops one, which a chat without a form has for its template's sake."""
    answer = client.completions.create(model="chain", prompt="a", logprobs=0).choices[0]
    places = zip(answer.logprobs.tokens, answer.logprobs.text_offset, strict=True)
    assert all(answer.text.startswith(token, offset) for token, offset in places)
    form = {"regex": " one( two)?"}
    content = chat(client, model="chain", extra_body=form).choices[0].message.content
    assert content.startswith(" one")


def test_streams_add_up(client):
    expected = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == TOKENS
    assert len(chunks) > 3
    stream = client.completions.create(
        model="mine", prompt="One day", max_tokens=TOKENS, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == complete(client)


def test_requests_choose_their_probes(client, flash):
    texts = {}
    for settings in ({}, {"n_probes": 1}, {"n_probes": N_CLUSTERS}, {"dense": True}):
        texts[str(settings)] = complete(client, extra=settings)
        assert texts[str(settings)] == generated(flash, **settings), settings
    assert len(set(texts.values())) == 1  # every token is checked


def test_concurrent_requests_are_answered_as_alone(client, flash):
    """Batches of one setting, several settings at once, and seeds, which run alone."""
    settings = [{}, {"n_probes": 1}, {"dense": True}]
    prompts = ["One day", "x", "How do I bake bread?", "The bridge over the river was old"]
    requests = [(prompt, extra) for prompt in prompts for extra in settings] * 2
    with ThreadPoolExecutor(len(requests)) as pool:
        sampled = pool.submit(complete, client, seed=5, temperature=1.0)
        texts = list(pool.map(lambda r: complete(client, r[0], extra=r[1]), requests))
    for (prompt, extra), text in zip(requests, texts, strict=True):
        assert text == generated(flash, prompt, **extra), (prompt, extra)
    assert sampled.result() == complete(client, seed=5, temperature=1.0)


def test_logprobs_are_the_models(client, flash):
    responses = list(mlx_flashhead.stream_generate(*flash, "One day", max_tokens=TOKENS))
    answer = client.completions.create(
        model="mine", prompt="One day", max_tokens=TOKENS, logprobs=4
    )
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.text_offset) == TOKENS
    for i, response in enumerate(responses):
        expected = mx.sort(response.logprobs)[::-1][:4].tolist()
        assert list(found.top_logprobs[i].values()) == pytest.approx(expected, abs=1e-4)
        assert found.token_logprobs[i] == pytest.approx(expected[0], abs=1e-4)
        assert found.top_logprobs[i][found.tokens[i]] == found.token_logprobs[i]


def test_a_stream_reports_its_speed_in_a_comment(server):
    body = json.dumps({"messages": MESSAGES, "max_tokens": TOKENS, "stream": True})
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", data=body.encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    comments = [line for line in lines if line.startswith(": ")]
    assert re.fullmatch(r": \d+\.\d\d tokens/s", comments[-1])


def test_page_is_told_the_models(server, flash):
    with urllib.request.urlopen(f"{server.url}/page/info.json", timeout=60) as answer:
        models = strict(answer.read())["models"]
    assert [model["name"] for model in models] == ["mine", "chain"]
    head = mlx_flashhead.get_flash_head(flash[0])
    known = {"dense": False, "n_probes": head.n_probes, "n_clusters": N_CLUSTERS}
    assert models[0] == {"name": "mine"} | known


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_tokens_by_text_and_bytes(client, flash, stream):
    prompt = flash[1].apply_chat_template(MESSAGES, add_generation_prompt=True)
    responses = list(mlx_flashhead.stream_generate(*flash, prompt, max_tokens=TOKENS))
    answer = chat(client, logprobs=True, top_logprobs=20, stream=stream)
    choices = [c.choices[0] for c in answer] if stream else answer.choices
    content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    assert len(content) == TOKENS
    for entry, response in zip(content, responses, strict=True):
        # the tokenizer has a token for each byte
        (byte,) = entry.bytes
        assert entry.token == bytes([byte]).decode("utf-8", "replace")
        assert len(entry.top_logprobs) == 20
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert entry.bytes == entry.top_logprobs[0].bytes
        assert entry.logprob == pytest.approx(response.logprobs.max().item(), abs=1e-4)
    text = "".join((c.delta.content or "") if stream else c.message.content for c in choices)
    assert bytes(b for e in content for b in e.bytes).decode("utf-8", "replace") == text


def test_logprob_is_that_of_the_token_that_was_drawn(client):
    options = {"temperature": 1.5, "seed": 3, "logprobs": True, "top_logprobs": 2}
    content = chat(client, **options).choices[0].logprobs.content
    assert len(content) == TOKENS
    unlikely = 0
    for entry in content:
        tops = {tuple(top.bytes): top.logprob for top in entry.top_logprobs}
        assert list(tops.values()) == sorted(tops.values(), reverse=True)
        name = tuple(entry.bytes)
        assert tops.get(name, entry.logprob) == entry.logprob <= max(tops.values())
        unlikely += name not in tops
    assert unlikely


def test_seeds_repeat(client):
    options = {"temperature": 1.0, "max_tokens": 20}
    first, second, other = (complete(client, seed=seed, **options) for seed in (7, 7, 8))
    assert first == second != other
    assert complete(client, seed=-7, **options) == complete(client, seed=-7, **options)


def test_stop_words_end_the_text(client):
    options = {"model": "chain", "prompt": "a"}
    assert complete(client, **options) == " one two three four"
    for stop in (" three", ["x", " three"]):
        answer = client.completions.create(stop=stop, max_tokens=TOKENS, **options)
        assert answer.choices[0].text == " one two"
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "stop, text",
    [("three", " one two "), (["x", "wo th"], " one t"), (["three", "ne"], " o"), ("five", None)],
)
def test_stop_words_are_found_within_tokens(client, stop, text):
    options = {"model": "chain", "prompt": "a", "max_tokens": TOKENS, "stop": stop}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == (text or " one two three four")
    assert answer.choices[0].finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert "".join(chunk.text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_with_valid_json(client, stream):
    answer = chat(client, model="chain", tools=TOOLS, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        finish_reason = chunks[-1].finish_reason
    else:
        calls = answer.choices[0].message.tool_calls
        finish_reason = answer.choices[0].finish_reason
    (call,) = calls
    assert (call.function.name, finish_reason) == ("weather", "tool_calls")
    assert strict(call.function.arguments) == {"city": "Rome", "limit": None}


def test_called_tools_answer(client):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    answer = chat(client, model="chain", tools=TOOLS, messages=messages)
    assert answer.choices[0].message.tool_calls


def test_models_have_names_and_no_paths(server, client, random_model):
    names = [model.id for model in client.models.list().data]
    assert names == ["mine", "flash", "chain"]
    for name in names:
        assert client.models.retrieve(name).id == name
        assert chat(client, model=name, max_tokens=1).model == ("mine" if name == "flash" else name)
    with pytest.raises(openai.NotFoundError, match="choose mine or flash"):
        client.models.retrieve("/etc")
    told = [post(server, {"model": name}) for name in ("/no/such", str(random_model / "dense"))]
    assert told[0] == told[1]  # which folders there are is not said


def test_several_answers_and_prompts(client, flash):
    answer = client.completions.create(
        model="mine", prompt=["One day", "x"], n=2, max_tokens=TOKENS
    )
    expected = [generated(flash, prompt) for prompt in ("One day", "x") for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.completion_tokens == 4 * TOKENS
    drawn = chat(client, n=3, temperature=1.0, seed=5, stream=True)
    texts = ["", "", ""]
    for chunk in drawn:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(texts)) == 3
    whole = chat(client, n=3, temperature=1.0, seed=5)
    assert [choice.message.content for choice in whole.choices] == texts


def test_biases_choose_tokens(client, flash):
    (token,) = flash[1].encode("7")
    assert complete(client, logit_bias={str(token): 100}) == "7" * TOKENS
    assert complete(client, extra={"logit_bias": {token: 1e30}}) == "7" * TOKENS
    first = chat(client, logprobs=True).choices[0].logprobs.content[0].bytes
    names = TokenNames(flash[1])
    (token,) = [i for i in range(VOCAB_SIZE) if names.bytes(i) == bytes(first)]
    answer = chat(client, logit_bias={token: -1e30}, logprobs=True)
    assert all(entry.bytes != first for entry in answer.choices[0].logprobs.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "change, field",
    [
        ({"messages": "hello"}, "messages"),
        ({"n_probes": N_CLUSTERS + 1}, "n_probes"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"chat_template_kwargs": {"chat_template": ENDLESS}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
        ({"model": "./absent"}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_mistakes_are_told(server, change, field, stream):
    """Each kind once: test_requests.py and test_prompts.py have the rest."""
    status, answer = post(server, {"messages": MESSAGES, "stream": stream} | change)
    assert status == (404 if field == "model" else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == field
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, path, status, said",
    [
        (b"{", "/v1/completions", 400, "The body is not JSON"),
        (b"[]", "/v1/completions", 400, "must be a JSON object"),
        (b"{}", "/v1/no/such", 404, "nothing at /v1/no/such"),
        (None, "/no/such", 404, "nothing at /no/such"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_request_is_told(server, body, path, status, said):
    if body is None:
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(server.url + path, timeout=60)
        found = told.value.code, strict(told.value.read())
    else:
        found = post(server, body, path)
    assert found[0] == status
    assert said in found[1]["error"]["message"]


def send(server, **fields):
    """A connection on which a chat was asked for."""
    body = json.dumps({"messages": MESSAGES, "logit_bias": {"50": 100}} | fields).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_only_sends_no_more_has_its_answer(server, stream):
    with send(server, max_tokens=400, stream=stream) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b'"finish_reason": "length"' in answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_is_logged_and_not_computed_for(server, client, flash, stream):
    with send(server, max_tokens=400, stream=stream) as connection:
        if stream:
            connection.recv(1)
    for _ in range(200):
        lines = [line for line in server.log().splitlines() if "the client has gone" in line]
        if len(lines) > stream:  # the first of these tests has left one
            break
        time.sleep(0.02)
    assert "POST /v1/chat/completions" in lines[-1]
    n_tokens = int(lines[-1].split(" + ")[1].split()[0])
    assert n_tokens < 400


def test_answers_without_a_token_have_no_part_in_the_speed():
    jobs = [SimpleNamespace(n_tokens=5, times=[1.0, 3.0])]
    jobs += [SimpleNamespace(n_tokens=0, times=[])] * 9
    assert _Answer._speed(SimpleNamespace(_jobs=jobs)) == 2.0


def test_the_log_has_a_line_for_each_request_and_no_prompt(server, client):
    time.sleep(0.2)  # the lines of the tests before
    before = len(server.log().splitlines())
    complete(client, "a secret", max_tokens=3)
    with pytest.raises(openai.BadRequestError):
        complete(client, "a secret", extra={"secret": 1})
    lines = server.lines(2, after=before)
    assert len(lines) == 2
    assert re.fullmatch(
        r"[-0-9]+ [:0-9]+ 127\.0\.0\.1 POST /v1/completions HTTP/1\.1 200 [.0-9]+ s, "
        r"8 \+ 3 tokens, [.0-9]+ tokens/s",
        lines[0],
    )
    assert "400" in lines[1]
    assert "secret" not in server.log()


def test_nothing_has_ended_the_server(server, client, flash):
    """Last in this file: after all of the above."""
    assert complete(client) == generated(flash)
    with urllib.request.urlopen(f"{server.url}/health", timeout=60) as answer:
        health = strict(answer.read())
    assert health["status"] == "ok" and set(health["heads"]) == {"FlashHead"}
    assert "Traceback" not in server.log()
