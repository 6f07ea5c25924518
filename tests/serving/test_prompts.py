"""From requests to tokens: templates, their settings and their time, and the context's limit."""

import copy

import pytest

from engines import checked
from mlx_flashhead.serving import prompts
from mlx_flashhead.serving.answer_text import AnswerText
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.fill_in_the_middle import MIDDLE_FORMATS, middle_format
from mlx_flashhead.serving.jobs import Job
from mlx_flashhead.serving.prompts import Prompt, read_prompts
from mlx_flashhead.serving.served_models import ServedModel


def chat(served, content="One day", **fields):
    messages = [{"role": "user", "content": content}]
    (prompt,) = read_prompts(checked(served, {"messages": messages} | fields))
    return prompt


def text(served, prompt):
    (prompt,) = read_prompts(checked(served, {"prompt": prompt}, chat=False))
    return prompt.tokens


def with_template(served, template, **template_arguments):
    """The same model with another chat template."""
    tokenizer = copy.copy(served.tokenizer)
    tokenizer._tokenizer = copy.copy(served.tokenizer._tokenizer)
    tokenizer.chat_template = template
    tokenizer.has_chat_template = template is not None
    return ServedModel(
        served.names,
        served.model,
        tokenizer,
        None,
        served.context,
        template_arguments=template_arguments,
    )


def test_settings_are_those_that_the_template_takes(tiny):
    served = with_template(tiny, "{{ mode }}{% if loud %}!{% endif %}{{ messages[0].content }}")
    assert served.template_settings == {"mode", "loud"}

    def filled_in(**settings):
        return served.tokenizer.decode(chat(served, chat_template_kwargs=settings).tokens)

    assert filled_in(mode="a", loud=True) == "a!One day"
    assert filled_in(mode=5) == "5One day"
    for value in ([1], {"a": 1}):
        with pytest.raises(ApiError, match="mode must be"):
            filled_in(mode=value)
    with pytest.raises(ApiError, match="takes: loud, mode"):
        filled_in(other=1)
    for name in ("chat_template", "messages", "tools", "bos_token", "add_generation_prompt"):
        with pytest.raises(ApiError, match=f"{name} is not a setting") as refused:
            filled_in(**{name: "x"})
        assert refused.value.field == "chat_template_kwargs"
    # those by whoever starts the server may be anything
    served = with_template(tiny, "{{ a[0] }}{{ b }}", a=["x"], b=1)
    assert (filled_in(), filled_in(b=2)) == ("x1", "x2")


def test_templates_that_fail_are_errors_of_the_messages(tiny):
    for template, said in (
        (None, "no chat template: use /v1/completions"),
        ("{{ raise_exception('only two messages') }}", r"\(only two messages\): send fewer"),
    ):
        with pytest.raises(ApiError, match=said) as refused:
            chat(with_template(tiny, template))
        assert refused.value.field == "messages"


TOO_LONG = "The prompt is longer than this model's 512-token context: shorten it."


def test_a_prompt_leaves_room_for_a_token(tiny):
    assert len(text(tiny, "a" * 511)) == 511
    with pytest.raises(ApiError, match=TOO_LONG) as refused:
        text(tiny, "a" * 512)
    assert (refused.value.field, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ApiError, match=TOO_LONG):
        chat(tiny, "a" * 508)
    with pytest.raises(ApiError, match=TOO_LONG):
        text(tiny, [5] * 512)
    for empty in ("", [[]]):
        with pytest.raises(ApiError, match="The prompt is empty"):
            text(tiny, empty)


def test_a_text_that_is_too_long_is_tokenized_as_far_as_the_context_reaches(tiny, monkeypatch):
    inner = type(tiny.tokenizer._tokenizer)
    lengths = []
    encode = inner.encode

    def encoded(self, text, **options):
        lengths.append(len(text))
        return encode(self, text, **options)

    request = checked(tiny, {"prompt": "\U0001f600" * 660_000}, chat=False)
    monkeypatch.setattr(inner, "encode", encoded)
    with pytest.raises(ApiError, match=TOO_LONG):
        read_prompts(request)
    assert lengths == [prompts.PART]
    # Cutting rejects nothing.
    monkeypatch.setattr(prompts, "PART", 100)
    assert len(text(tiny, "a" * 511)) == 511


def test_control_tokens_of_users_are_tokens_as_in_mlx_lm_or_text_with_the_flag(chain):
    """Exactly the text that the user has written, also where two of them overlap."""
    text = "a</s><s></s<s>>< <tool_call>\ufdd0[</s> b"
    messages = [
        {"role": "system", "content": "Be </s>."},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "</s>"},
        {"role": "tool", "content": "</s>"},
    ]
    tokenizer = chain.tokenizer
    end = tokenizer.eos_token_id
    call = tokenizer.convert_tokens_to_ids("<tool_call>")

    def read(*arguments):
        (prompt,) = read_prompts(checked(chain, {"messages": messages}, arguments=arguments))
        return prompt.tokens

    plain = read()
    escaped = read("--escape-control-tokens")
    assert (plain.count(end), plain.count(call)) == (5, 1)
    # Those of the system and of the model are left.
    assert (escaped.count(end), escaped.count(call)) == (2, 0)
    assert tokenizer.decode(escaped) == tokenizer.decode(plain)
    # With the flag this has 300 tokens more than without it.
    messages[1]["content"] = "a" * 300 + "</s>" * 100
    assert len(read()) < 512
    with pytest.raises(ApiError, match=TOO_LONG):
        read("--escape-control-tokens")
    messages[1]["content"] = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert read("--escape-control-tokens").count(end) == 2


def test_an_answer_may_fill_the_context(tiny):
    """Unless the request or the server has a limit."""
    prompt = Prompt([5] * 100)
    for fields, arguments, most in (
        ({}, (), 412),
        ({"max_tokens": -1}, (), 412),
        ({}, ("--max-tokens", 9), 9),
        ({"max_tokens": -1}, ("--max-tokens", 9), 9),
        ({"max_tokens": 50}, ("--max-tokens", 9), 50),
        ({"max_completion_tokens": 9999}, ("--max-tokens", 9), 412),
    ):
        body = {"messages": [{"role": "user", "content": "x"}]} | fields
        assert Job(checked(tiny, body, arguments=arguments), prompt).max_tokens == most


def test_a_gap_is_marked_by_the_tokens_of_the_vocabulary(tiny):
    tokenizer = copy.copy(tiny.tokenizer)
    tokenizer._tokenizer = copy.deepcopy(tiny.tokenizer._tokenizer)
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
    tokenizer._tokenizer.add_tokens(names, special_tokens=True)
    tokenizer._detokenizer = type(tokenizer._detokenizer)(tokenizer._tokenizer)
    served = ServedModel(tiny.names, tiny.model, tokenizer, None, tiny.context)
    before, after, middle, end = map(tokenizer.convert_tokens_to_ids, names)
    request = checked(served, {"prompt": "ab", "suffix": "c", "max_tokens": 9}, chat=False)
    (prompt,) = read_prompts(request)
    a, b, c = tokenizer.encode("abc", add_special_tokens=False)
    assert prompt.tokens == [before, a, b, after, c, middle]
    text = AnswerText(tokenizer, request.stop, prompt.state, prompt.keep_space)
    parts = [text.add(token) for token in (a, end)]
    assert (parts[0].content, parts[1].finish_reason) == ("a", "stop")


def test_the_text_of_a_gap_is_asked_for_in_the_models_own_tokens(tiny, monkeypatch):
    qwen = MIDDLE_FORMATS[0]
    codestral = MIDDLE_FORMATS[4]
    monkeypatch.setattr(tiny, "middle", qwen)
    monkeypatch.setattr(tiny, "middle_ends", ["<|file_sep|>"])
    fields = {"prompt": ["def f(", "x"], "suffix": "):", "stop": "\n"}
    request = checked(tiny, fields, chat=False)
    before, after, middle = qwen.tokens
    assert request.prompts == [f"{before}{text}{after}):{middle}" for text in fields["prompt"]]
    text = AnswerText(tiny.tokenizer, request.stop, "normal")
    ended = [text.add(token) for token in tiny.tokenizer.encode("ab<|file_sep|>")]
    assert "".join(part.content for part in ended) == "ab" and ended[-1].finish_reason == "stop"
    assert codestral.prompt("a", "b") == "[SUFFIX]b[PREFIX]a"
    with pytest.raises(ApiError, match="needs prompts that are texts"):
        checked(tiny, fields | {"prompt": [5, 6]}, chat=False)
    # what a tokenizer has decides
    for known in MIDDLE_FORMATS:
        assert middle_format({*known.tokens, "a"}) is known
        assert middle_format({*known.tokens[1:], "a"}) is None
    monkeypatch.undo()
    assert tiny.middle is None and not tiny.middle_ends
