"""The server, driven by OpenAI's client: mlx-lm's answers, with FlashHead models."""

import json
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import openai
import pytest

import mlx_flashhead
from chain_models import write_chain_model, write_model_with_ruled_out_tokens
from model_folders import VOCAB_SIZE, write_model
from server_process import serving

MESSAGES = [{"role": "user", "content": "One day"}]
CALL = '{"name": "weather", "arguments": {"city": "Rome", "limit": Infinity}}'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WORDS = ("<tool_call>", CALL, "</tool_call>", " one", " two", " three", " four")
N_CLUSTERS = -(-VOCAB_SIZE // 16)
TOKENS = 12


def convert(folder, **options):
    """Converts ``folder`` / dense."""
    new = folder / "flash"
    options = {"calibration": "none", "progress": False} | options
    mlx_flashhead.convert(str(folder / "dense"), str(new), **options)
    return new


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A folder with ``dense`` and ``flash``, a FlashHead of 4 probes."""
    folder = tmp_path_factory.mktemp("random")
    write_model(folder / "dense", tied=False, hidden_size=128)
    convert(folder, n_probes=4)
    return folder


@pytest.fixture(scope="module")
def chain_model(tmp_path_factory):
    """A checkpoint that calls a tool in a chat, and counts to four after the text "a"."""
    folder = tmp_path_factory.mktemp("chain")
    chains = [" ", *WORDS[:3]], ["a", *WORDS[3:]]
    write_chain_model(folder / "dense", *chains, words=WORDS)
    return convert(folder, n_probes=2)


@pytest.fixture(scope="module")
def server(random_model, tmp_path_factory):
    """A server of the random model."""
    with serving(tmp_path_factory.mktemp("server"), "--model", random_model / "flash") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def flash(random_model):
    """``(model, tokenizer)`` of what is served."""
    return mlx_flashhead.load(str(random_model / "flash"))


def chat(client, model="default_model", **options):
    options = {"messages": MESSAGES, "max_tokens": TOKENS} | options
    return client.chat.completions.create(model=model, **options)


def complete(client, prompt="One day", model="default_model", **options):
    """The text of a completion."""
    options = {"max_tokens": TOKENS, "extra_body": options.pop("extra", None)} | options
    return client.completions.create(model=model, prompt=prompt, **options).choices[0].text


def generated(flash, prompt="One day", **options):
    """The same by the package; mlx-lm's server leaves out what comes with an end token."""
    responses = mlx_flashhead.stream_generate(*flash, prompt, max_tokens=TOKENS, **options)
    return "".join(r.text for r in responses if r.finish_reason != "stop")


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
def test_a_text_is_continued(client, flash, chain_model, options):
    """The prompt is all that the server has in its cache of the first request."""
    model = str(chain_model)
    first = complete(client, "a", model=model, max_tokens=2, **options)
    assert first == "one two"
    assert complete(client, "a one two", model=model, **options) == "three four"


def test_streams_add_up(client):
    expected = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == TOKENS
    assert len(chunks) > 3
    stream = client.completions.create(
        model="default_model", prompt="One day", max_tokens=TOKENS, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == complete(client)


def test_requests_choose_their_probes(client, flash):
    texts = {}
    for settings in ({}, {"n_probes": 1}, {"n_probes": N_CLUSTERS}, {"dense": True}):
        texts[str(settings)] = complete(client, extra=settings)
        assert texts[str(settings)] == generated(flash, **settings), settings
    assert len(set(texts.values())) == 3
    assert complete(client) == generated(flash)  # which the others have not changed


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
    _, tokenizer = flash
    responses = list(mlx_flashhead.stream_generate(*flash, "One day", max_tokens=TOKENS))
    answer = client.completions.create(
        model="default_model",
        prompt="One day",
        max_tokens=TOKENS,
        extra_body={"logprobs": True, "top_logprobs": 4},
    )
    content = answer.choices[0].logprobs.content
    assert [entry["id"] for entry in content] == [r.token for r in responses]
    for entry, response in zip(content, responses, strict=True):
        assert entry["token"] == tokenizer.convert_ids_to_tokens(response.token)
        expected = mx.sort(response.logprobs)[::-1][:4].tolist()
        found = [top["logprob"] for top in entry["top_logprobs"]]
        assert found == pytest.approx(expected, abs=1e-4)
        assert entry["logprob"] == found[0]


def test_logprob_is_that_of_the_token_that_was_drawn(client):
    options = {"temperature": 1.5, "seed": 3, "logprobs": True, "top_logprobs": 2}
    content = chat(client, **options).choices[0].logprobs.content
    assert len(content) == TOKENS
    unlikely = 0
    for entry in content:
        tops = {top.token: top.logprob for top in entry.top_logprobs}
        assert list(tops.values()) == sorted(tops.values(), reverse=True)
        assert tops.get(entry.token, entry.logprob) == entry.logprob <= max(tops.values())
        unlikely += entry.token not in tops
    assert unlikely


def test_seeds_repeat(client):
    options = {"temperature": 1.0, "max_tokens": 20}
    first, second, other = (complete(client, seed=seed, **options) for seed in (7, 7, 8))
    assert first == second != other
    assert complete(client, seed=-7, **options) == complete(client, seed=-7, **options)


def test_stop_words_end_the_text(client, chain_model):
    options = {"model": str(chain_model), "prompt": "a"}
    assert complete(client, **options) == "one two three four"
    for stop in (" three", ["x", " three"]):
        answer = client.completions.create(stop=stop, max_tokens=TOKENS, **options)
        assert answer.choices[0].text == "one two"
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "stop, text",
    [("three", "one two "), (["x", "wo th"], "one t"), (["three", "ne"], "o"), ("five", None)],
)
def test_stop_words_are_found_within_tokens(client, chain_model, stop, text):
    options = {"model": str(chain_model), "prompt": "a", "max_tokens": TOKENS, "stop": stop}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == (text or "one two three four")
    assert answer.choices[0].finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert "".join(chunk.text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_with_valid_json(client, chain_model, stream):
    answer = chat(client, model=str(chain_model), tools=TOOLS, stream=stream)
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


def test_called_tools_answer(client, chain_model):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    answer = chat(client, model=str(chain_model), tools=TOOLS, messages=messages)
    assert answer.choices[0].message.tool_calls


def test_models_are_listed(client, random_model):
    (model,) = client.models.list().data
    assert model.id == str(random_model / "flash")
    assert complete(client, model=model.id) == complete(client)


def test_cached_repositories_are_listed_and_served(server, client, random_model):
    repository = server.errors.parent / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(random_model / "flash", repository / "snapshots" / ("0" * 40))
    try:
        names = {model.id for model in client.models.list().data}
        assert names == {"someone/model", str(random_model / "flash")}
        assert complete(client, model="someone/model") == complete(client)
        assert "someone/model" not in server.log()
    finally:
        shutil.rmtree(repository)


def test_other_models_are_served_dense_and_the_log_says_so(server, client, random_model):
    dense = random_model / "dense"
    model, tokenizer = mlx_lm.load(str(dense))
    expected = mlx_lm.generate(model, tokenizer, "One day", max_tokens=TOKENS)
    assert complete(client, model=str(dense)) == expected
    assert f"{dense} is no FlashHead checkpoint: it is served dense." in server.log()
    assert complete(client) != expected
    with pytest.raises(openai.BadRequestError, match="has no FlashHead"):
        complete(client, model=str(dense), extra={"n_probes": 2})


def test_biases_choose_tokens(client, flash):
    (token,) = flash[1].encode("7")
    assert complete(client, logit_bias={str(token): 100}) == "7" * TOKENS
    assert complete(client, extra={"logit_bias": {token: 1e30}}) == "7" * TOKENS
    (first,) = flash[1].encode(complete(client, max_tokens=1), add_special_tokens=False)[:1]
    answer = chat(client, logit_bias={first: -1e30}, logprobs=True, top_logprobs=11)
    entries = answer.choices[0].logprobs.content
    assert all(entry.id != first for entry in entries)


def test_ruled_out_tokens_have_logprobs_that_json_can_hold(server, tmp_path):
    folder = write_model_with_ruled_out_tokens(tmp_path / "model", "a", allowed=5)
    body = {"model": str(folder), "prompt": "a", "max_tokens": 1, "top_logprobs": 8}
    status, answer = post(server, body, "/v1/completions")
    assert status == 200
    tops = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [top["logprob"] == -9999.0 for top in tops] == [False] * 5 + [True] * 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["hello"]}, "messages must be a list"),
        ({"messages": [{"content": "hello"}]}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "text"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "NaN and Infinity"),
        ({"logit_bias": {"5": float("inf")}}, "NaN and Infinity"),
        ({"logit_bias": {"5": None}}, "logit_bias must give"),
        ({"logit_bias": {"5000": 1}}, f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"logit_bias": {"-1": 1}}, f"choose 0 to {VOCAB_SIZE - 1}"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 10**30}, "it must be at most"),
        ({"n_probes": 0}, "n_probes is 0"),
        ({"n_probes": 2.5}, "n_probes is 2.5"),
        ({"n_probes": N_CLUSTERS + 1}, f"choose 1 to {N_CLUSTERS}"),
        ({"dense": 1}, "true or false"),
        ({"dense": True, "n_probes": 3}, "leave n_probes out"),
        ({"stop": ""}, "stop must be"),
        ({"stop": [1]}, "stop must be"),
        ({"seed": 2**64}, "64 bits"),
        ({"tools": {}}, "tools must be a list"),
        ({"stream_options": 1}, "stream_options must be"),
        ({"top_logprobs": 12}, "top_logprobs must be at most 11"),
        ({"chat_template_kwargs": {"return_tensors": "np"}}, "a list of tokens"),
        ({"model": "./absent"}, "There is no folder ./absent"),
        ({"adapters": "./absent"}, "absent"),
        ({"draft_model": "./absent"}, "There is no folder ./absent"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_mistakes_are_told(server, random_model, change, said, stream):
    body = {"messages": MESSAGES, "stream": stream} | change
    if body.get("adapters"):
        body["model"] = str(random_model / "flash")
    status, answer = post(server, body)
    assert status == (404 if {"model", "adapters", "draft_model"} & change.keys() else 400)
    assert said in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "body, path, status, said",
    [
        (b"{", "/v1/completions", 400, "Invalid JSON"),
        (b"[]", "/v1/completions", 400, "dictionary"),
        (b"\xff", "/v1/completions", 400, "decode"),
        (b"[" * 100_000, "/v1/completions", 400, "recursion"),
        (b"{}", "/v1/completions", 400, "prompt must be a text"),
        (b'{"prompt": ["a"]}', "/v1/completions", 400, "prompt must be a text"),
        (b'{"prompt": ""}', "/v1/completions", 400, "The prompt is empty"),
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


def test_large_top_k_cuts_nothing_off(client):
    options = {"temperature": 1.0, "seed": 2}
    assert complete(client, extra={"top_k": 10**6}, **options) == complete(client, **options)


def test_nothing_has_ended_the_server(server, client, flash):
    """Last in this file: after all of the above."""
    assert complete(client) == generated(flash)
    assert post_health(server) == {"status": "ok"}
    assert "Traceback" not in server.log()


def post_health(server):
    with urllib.request.urlopen(f"{server.url}/health", timeout=60) as answer:
        return strict(answer.read())
