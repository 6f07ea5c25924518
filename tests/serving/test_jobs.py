"""From requests to tokens: templates, their settings and their time, and the context's limit."""

import copy

import pytest

from engines import checked
from mlx_flashhead.serving import jobs
from mlx_flashhead.serving.api_errors import ApiError
from mlx_flashhead.serving.jobs import read_prompts
from mlx_flashhead.serving.served_models import ServedModel


def chat(served, content="One day", **fields):
    messages = [{"role": "user", "content": content}]
    (prompt,) = read_prompts(checked(served, {"messages": messages} | fields))
    return prompt


def text(served, prompt):
    (prompt,) = read_prompts(checked(served, {"prompt": prompt}, chat=False))
    return prompt.tokens


def with_template(served, template, template_arguments=None):
    """The same model with another chat template."""
    tokenizer = copy.copy(served.tokenizer)
    tokenizer._tokenizer = copy.copy(served.tokenizer._tokenizer)
    tokenizer.chat_template, tokenizer.has_chat_template = template, template is not None
    options = {"template_arguments": template_arguments or {}}
    return ServedModel(served.names, served.model, tokenizer, None, served.context, **options)


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
    served = with_template(tiny, "{{ a[0] }}{{ b }}", template_arguments={"a": ["x"], "b": 1})
    assert (filled_in(), filled_in(b=2)) == ("x1", "x2")


def test_templates_that_fail_are_errors_of_the_messages(tiny):
    for template, said in (
        (None, "no chat template: use /v1/completions"),
        ("{{ raise_exception('only two messages') }}", r"\(only two messages\): send fewer"),
    ):
        with pytest.raises(ApiError, match=said) as refused:
            chat(with_template(tiny, template))
        assert refused.value.field == "messages"


def test_a_prompt_leaves_room_for_a_token(tiny):
    assert len(text(tiny, "a" * 511)) == 511
    with pytest.raises(ApiError, match="has 512 tokens, and at most 511 are read") as refused:
        text(tiny, "a" * 512)
    assert (refused.value.field, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ApiError, match="more than 512 tokens, and at most 511"):
        chat(tiny, "a" * 508)
    with pytest.raises(ApiError, match="at most 511"):
        text(tiny, [5] * 512)
    for empty in ("", [[]]):
        with pytest.raises(ApiError, match="The prompt is empty"):
            text(tiny, empty)


def test_a_text_that_is_too_long_is_tokenized_as_far_as_the_context_reaches(tiny, monkeypatch):
    inner, lengths = type(tiny.tokenizer._tokenizer), []
    encode = inner.encode

    def encoded(self, text, **options):
        lengths.append(len(text))
        return encode(self, text, **options)

    request = checked(tiny, {"prompt": "\U0001f600" * 660_000}, chat=False)
    monkeypatch.setattr(inner, "encode", encoded)
    with pytest.raises(ApiError, match="more than 512 tokens"):
        read_prompts(request)
    assert lengths == [jobs.PART]
    monkeypatch.setattr(jobs, "PART", 100)  # cutting rejects nothing
    assert len(text(tiny, "a" * 511)) == 511
