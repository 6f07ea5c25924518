"""What a request may hold: served as OpenAI's API has it, or rejected by the field's name."""

import json

import pytest

from engines import checked
from mlx_flashhead.decoding.settings import DecodingSettings
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.completion_fields import MAX_CHOICES, MAX_LOGPROBS
from mlx_flashhead.serving.requests import MAX_FORM_CHARACTERS
from model_folders import VOCAB_SIZE

N_CLUSTERS = -(-VOCAB_SIZE // 16)
MESSAGES = [{"role": "user", "content": "One day"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LARK = 'start: "yes" | "no"'
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2000}]
CALLS = [
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 200}
]


def chat(served, **fields):
    return checked(served, {"messages": MESSAGES} | fields)


def text(served, **fields):
    return checked(served, {"prompt": "One day"} | fields, chat=False)


def message(content="Hi", **further):
    """Messages of a single one."""
    return [{"role": "assistant", "content": content} | further]


def test_defaults_are_the_flags(tiny):
    arguments = ("--temp", 0.5, "--top-p", 0.9, "--top-k", 7, "--min-p", 0.1, "--max-tokens", 9)
    request = checked(tiny, {"messages": MESSAGES}, arguments=arguments)
    fields = request.fields
    assert (fields.temperature, fields.top_p, fields.top_k, fields.min_p) == (0.5, 0.9, 7, 0.1)
    assert (fields.max_tokens, fields.n_probes, request.logprobs) == (9, None, None)
    # Without a limit an answer may take the rest of the context.
    assert checked(tiny, {"messages": MESSAGES}).fields.max_tokens is None
    nulls = dict.fromkeys(field.split("[")[0] for field in CHAT_MISTAKES)
    same = checked(tiny, nulls | {"messages": MESSAGES}, arguments=arguments)
    assert vars(request) | {"stop": None} == vars(same) | {"stop": None}


def test_values_arrive(tiny):
    fields = {"stream": True, "stream_options": {"include_usage": True}, "stop": "x", "n": 3}
    fields |= {"max_completion_tokens": 6, "temperature": 1, "top_k": 3, "seed": -5}
    fields |= {"logprobs": True, "top_logprobs": MAX_LOGPROBS, "logit_bias": {"5": 1e30, "6": -1}}
    without_effect = {"frequency_penalty": 0.5, "user": "me", "metadata": {"a": "b"}}
    without_effect |= {"tool_choice": "none", "model": "tiny"}
    request = chat(tiny, **fields, **without_effect)
    fields = request.fields
    assert (fields.stream, fields.stream_options.include_usage, fields.n) == (True, True, 3)
    assert (fields.max_tokens, fields.seed) == (6, -5)
    assert (fields.temperature, fields.top_k, request.logprobs) == (1.0, 3, 20)
    assert fields.logit_bias == {5: 1e4, 6: -1.0}
    assert chat(tiny, logprobs=True).logprobs == 0
    assert text(tiny, logprobs=2).logprobs == 2
    for prompts in (["a", "b"], [[1, 2], [3]], ["a", [3]]):
        assert text(tiny, prompt=prompts).prompts == prompts
    for prompt in ("a", [1, 2]):
        assert text(tiny, prompt=prompt).prompts == [prompt]
    assert chat(tiny, top_k=10**6).fields.top_k == 0
    for least in ({"temperature": 1e-7}, {"temperature": 1, "top_p": 0}):
        assert chat(tiny, **least).fields.temperature == 0


def test_what_changes_nothing_is_taken_and_named(tiny):
    taken = {"store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "flex"}
    taken |= {"keep_alive": "5m", "reasoning_effort": "low"}
    taken |= {"verbosity": "low", "stream_options": {"include_usage": True}, "x" * 1000: [5]}
    request = chat(tiny, **taken)
    assert sorted(request.ignored) == sorted(taken)
    assert request.template_settings == {}
    options = {"include_usage": True, "include_obfuscation": True}
    request = chat(tiny, stream=True, stream_options=options)
    assert request.fields.stream_options.include_usage and request.ignored == []
    assert text(tiny, keep_alive=5, store=None).ignored == ["keep_alive"]
    neutral = {"best_of": 1, "echo": False, "suffix": "", "repeat_penalty": 1.0, "top_logprobs": 0}
    assert text(tiny, **neutral).ignored == []


def test_minus_one_is_no_limit(tiny):
    arguments = ("--max-tokens", 9, "--top-k", 7)
    body = {"messages": MESSAGES, "max_tokens": -1, "top_k": -1}
    request = checked(tiny, body, arguments=arguments)
    assert (request.fields.max_tokens, request.fields.top_k) == (9, 0)
    assert chat(tiny, max_completion_tokens=-1).fields.max_tokens is None
    assert chat(tiny, max_tokens=6, max_completion_tokens=6).fields.max_tokens == 6


def test_effort_goes_to_a_template_that_knows_it(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "template_settings", frozenset({"reasoning_effort"}))
    request = chat(tiny, reasoning_effort="low", verbosity="high")
    assert request.template_settings == {"reasoning_effort": "low"}
    assert request.ignored == ["verbosity"]
    named = {"chat_template_kwargs": {"reasoning_effort": "high"}}
    assert chat(tiny, reasoning_effort="low", **named).template_settings == {
        "reasoning_effort": "high"
    }


def test_developers_are_the_system_where_the_template_knows_none(tiny, monkeypatch):
    messages = [{"role": "developer", "content": "Be brief."}, *MESSAGES]
    assert chat(tiny, messages=messages).messages[0]["role"] == "system"
    monkeypatch.setattr(tiny, "takes_developer", True)
    assert chat(tiny, messages=messages).messages[0]["role"] == "developer"


@pytest.mark.parametrize("default", [False, True])
def test_dense_and_the_number_of_probes(tiny, monkeypatch, default):
    monkeypatch.setattr(tiny, "settings", DecodingSettings(dense=default))
    for fields, expected in (
        ({}, (None, default)),
        ({"n_probes": 2}, (2, False)),
        *(({"dense": dense}, (None, dense)) for dense in (True, False)),
    ):
        settled = chat(tiny, **fields).fields
        assert (settled.n_probes, settled.dense) == expected
    monkeypatch.setattr(type(tiny), "head", None)
    assert chat(tiny).fields.n_probes is chat(tiny, dense=True).fields.n_probes is None
    with pytest.raises(ApiError, match="has no FlashHead: leave n_probes out"):
        chat(tiny, n_probes=2)


def json_schema(schema, **further):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | further}


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "JSON schema"),
        ({"response_format": json_schema(SCHEMA, strict=True, description="y")}, "JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "JSON schema"),
        ({"response_format": {"type": "regex", "regex": "a+"}}, "regular expression"),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, "grammar"),
        ({"regex": "a+"}, "regular expression"),
        ({"grammar": LARK, "response_format": {"type": "text"}}, "grammar"),
    ],
)
def test_forms(tiny, fields, kind):
    grammar = chat(tiny, **fields).grammar
    if kind is None:
        assert grammar is None
    else:
        assert grammar.form == kind


# A field of a chat has what is said of it, and the values of which it is said.
CHAT_MISTAKES = {
    "messages": {"it must be a list of 1 to 4,096 objects": ["hello", [], None]},
    "messages[0]": {"it must be a list of 1 to 4,096 objects": [["hello"]]},
    "messages[0].role": {"is missing: it must be a text": [[{"content": "hello"}]]},
    "messages[0].content": {
        "must be a text": [message(5), message([{"type": "text"}])],
        'type is "` - at `$.n": it must be "text"': [message([{"type": "` - at `$.n"}])],
        "this model takes text only": [
            message([{"type": kind}]) for kind in ("image_url", "input_audio", "file", "video_url")
        ],
    },
    "messages[0].images": {"left out, since no images are read here": [message(images=["a"])]},
    "messages[0].tool_calls": {
        "a list of calls": [message(tool_calls={}), message(tool_calls=[{}])],
        "arguments in JSON": [message(tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
    },
    "model": {"choose tiny": ["gpt-4o", "", "/", 5]},
    "stream": {"true or false": [1]},
    "stream_options": {"an object": [[]]},
    "n": {"1 to 16": [0, MAX_CHOICES + 1]},
    "temperature": {"it must be a number, 0 to 2": [2.1, "1", True]},
    "xtc_threshold": {"0 to 0.5": [1]},
    "repetition_penalty": {"0 to 1e+30": [-1]},
    "presence_penalty": {"is 1000": [10**400]},
    "logit_bias": {
        "give each token id a number": [{"5": None}],
        f"choose 0 to {VOCAB_SIZE - 1}": [{"5000": 1}, {"-1": 1}, {"x": 1}],
    },
    "max_tokens": {"1 to 2147483647": [0, -2, 10**30]},
    "top_k": {"0 to 2147483647": [-2]},
    "best_of": {"can be 1, or left out": [2]},
    "echo": {"left out": [True]},
    "functions": {"leave it out": [[TOOL]]},
    "guided_json": {"leave it out": [SCHEMA]},
    "ignore_eos": {"can be false": [True]},
    "repeat_penalty": {"can be 1": [1.1]},
    "reasoning_effort": {"must be a text": [5]},
    "prompt": {"leave it out": ["One day"]},
    "suffix": {"left out": ["b"]},
    "n_probes": {f"1 to {N_CLUSTERS}": [0, N_CLUSTERS + 1], "n_probes is 2.5": [2.5]},
    "dense": {"true or false": [1]},
    "stop": {
        "at most 16 texts, each of 1 to 1,000": ["", {}, ["x"] * 17],
        "must be a text of 1 to 1,000": [[1], ["a", "x" * 1001]],
    },
    "seed": {"whole number": [2**64]},
    "logprobs": {"true or false": [5]},
    "top_logprobs": {"needs logprobs": [2], "0 to 20": [21]},
    "tools": {
        "must be a list": [{}],
        "knows no tools": [[TOOL]],
        "tools[0] must be": [[{}], [{"type": "function", "function": {}}]],
    },
    "tool_choice": {
        "there are no tools": ["required"],
        "must name some of the tools": [TOOL],
        'must be "none", "auto", "required"': ["sometimes", 5],
    },
    "response_format": {
        "must be an object with a type": ["json"],
        '"text" or "json_object"': [{"type": kind} for kind in ("xml", "`$.stop", ["text"])],
        "name is missing: it must be a text": [json_schema(SCHEMA, name=None)],
        "must be an object": [json_schema(5)],
        "schema is False": [json_schema(False)],
        "must be a text": [{"type": "regex"}],
        'a "name"': [{"type": "json_schema"}],
        "response_format.json_schema.schema: The JSON schema is wrong: Invalid type: x": [
            json_schema({"properties": {"a": {"type": "x"}}})
        ],
    },
    "regex": {
        "unclosed group": ["("],
        "must be a text": [5],
        "longer than": ["a" * MAX_FORM_CHARACTERS],
    },
    "grammar": {"line 1, column 8": ["start: x"]},
    "chat_template_kwargs": {"must be an object": [[]]},
}
TEXT_MISTAKES = {
    "prompt": {
        "prompt must be": [None, [], {}, ["a", 5], [1, "a"], [True]],
        f"choose 0 to {VOCAB_SIZE - 1}": [[VOCAB_SIZE], [-1]],
    },
    "logprobs": {"0 to 20": [True, 21]},
    "top_logprobs": {"left out": [2]},
    "echo": {"left out": [True]},
    "suffix": {"this one has none": ["b"], "must be a text": [5]},
    "best_of": {"left out": [2]},
    "messages": {"leave it out": [MESSAGES]},
    "tools": {"left out": [[TOOL]]},
}


def cases_of(read, mistakes):
    """(read, fields, field, said) of each value."""
    cases = []
    for field, by_reason in mistakes.items():
        name = field.split("[")[0]
        for said, values in by_reason.items():
            cases += [(read, {name: value}, field, said) for value in values]
    return cases


def named_by_fields(value):
    """A name of a case: the beginning of its fields."""
    if isinstance(value, dict):
        return json.dumps(value)[:40]
    # pytest chooses a name.
    return None


@pytest.mark.parametrize(
    "read, fields, field, said",
    [
        *cases_of(chat, CHAT_MISTAKES),
        *cases_of(text, TEXT_MISTAKES),
        (chat, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "they differ"),
        (
            chat,
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options",
            "stream_options.include_usage is 1: it must be true or false",
        ),
        (chat, {"response_format": {"type": "text", "x": 1}}, "x", "not a field"),
        (chat, {"response_format": {"type": "text", "` - at `$.n`": 1}}, "` - at `$.n`", "a field"),
        (chat, {"regex": "a", "grammar": LARK}, "response_format", "one form"),
        (chat, {"dense": True, "n_probes": 3}, "n_probes", "leave n_probes out"),
        (chat, {"response_format": {"type": "text", "x" * 100: 1}}, "x" * 80, "not a field"),
        (text, {"prompt": ["a"] * 9, "n": 2}, "n", "is 18: at most 16"),
        (text, {"prompt": [[5]] * 2000}, "n", "is 2000: at most 16"),
        (chat, {"messages": MESSAGES * 5000}, "messages", "is a list of 5,000: it must be"),
        (chat, {"tools": [TOOL] * 600}, "tools", "is a list of 600: it must be a list of at most"),
        (
            chat,
            {"messages": MESSAGES + PARTS},
            "messages[1].content",
            "is a list of 2,000: it must",
        ),
        (chat, {"messages": CALLS}, "messages[0].tool_calls", "is a list of 200: it must be a"),
    ],
    ids=named_by_fields,
)
def test_mistakes_name_the_field(tiny, read, fields, field, said):
    with pytest.raises(ApiError) as told:
        read(tiny, **fields)
    sentence = str(told.value)
    status = 404 if said == "choose tiny" else 400
    assert (told.value.field, told.value.status) == (field, status)
    assert said in sentence and "\n" not in sentence and len(sentence) < 200


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


def test_arguments_of_all_calls_are_counted_together(tiny):
    def message(text):
        call = {"function": {"name": "f", "arguments": text}}
        return {"role": "assistant", "tool_calls": [call]}

    lists = "[" + "[]," * 20_000 + "[]]"
    chat(tiny, messages=[message(lists)] * 2)
    with pytest.raises(ApiError, match="60,006 lists"):
        # the last one is no JSON, and hides nothing of what comes before
        chat(tiny, messages=[*[message(lists)] * 3, message('"')])


def test_what_a_template_may_read_of_a_message_stays(tiny):
    further = {"name": "me", "images": [], "reasoning_content": "Hm.", "prefix": True}
    (read,) = chat(tiny, messages=message(**further, audio=None)).messages
    assert read == {"role": "assistant", "content": "Hi", **further}
