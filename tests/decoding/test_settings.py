"""Keywords of mlx-lm's functions, and sentences for what is given in their place."""

import importlib
import inspect
from typing import get_args

import pytest

import mlx_flashhead
from mlx_flashhead.decoding.settings import (
    PROCESSOR_ARGUMENTS,
    SAMPLER_ARGUMENTS,
    DecodeOptions,
    DecodingSettings,
    GenerateOptions,
    SettingsOptions,
    check_keywords,
    check_prompt,
)

mlx_lm_generate = importlib.import_module("mlx_lm.generate")


def names_of(*functions):
    names = {name for each in functions for name in inspect.signature(each).parameters}
    return names - {"prompt", "model", "draft_model", "stream", "tokenizer", "kwargs", "max_tokens"}


def test_the_keywords_are_mlx_lms():
    steps = mlx_lm_generate.generate_step, mlx_lm_generate.speculative_generate_step
    assert names_of(*steps) == DecodeOptions.__annotations__.keys()
    further = GenerateOptions.__annotations__.keys() - DecodeOptions.__annotations__.keys()
    ours = SettingsOptions.__annotations__.keys()
    assert further == {"max_tokens", "draft_model", "stream", "logprobs"} | ours
    assert ours == DecodingSettings.__annotations__.keys()
    sampling = importlib.import_module("mlx_lm.sample_utils")
    assert names_of(sampling.make_sampler) == {*SAMPLER_ARGUMENTS}
    assert names_of(sampling.make_logits_processors) == {*PROCESSOR_ARGUMENTS}


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("temp", 0.5, "give `sampler=make_sampler(temp=0.5)`."),
        ("temperature", 0.5, "There is no keyword `temperature`: give `sampler=make_sampler(temp="),
        ("repetition_penalty", 1.1, "make_logits_processors(repetition_penalty=1.1)`."),
        ("max_token", 5, "There is no keyword `max_token`: did you mean `max_tokens`?"),
        ("max_new_tokens", 5, "did you mean `max_tokens`?"),
        ("zebra", 1, "There is no keyword `zebra`."),
    ],
)
def test_other_keywords_are_refused_with_a_remedy(name, value, said):
    known = GenerateOptions.__annotations__
    check_keywords({"max_tokens": 3, "sampler": None}, known)
    with pytest.raises(TypeError) as caught:
        check_keywords({"max_tokens": 3, name: value}, known)
    assert said in str(caught.value)


def test_the_functions_refuse_them(converted):
    model, tokenizer = mlx_flashhead.load(str(converted))
    message = [{"role": "user", "content": "Hello"}]
    for call in (
        lambda **named: next(mlx_flashhead.stream_generate(model, tokenizer, **named)),
        lambda **named: mlx_flashhead.generate(model, tokenizer, **named),
    ):
        with pytest.raises(TypeError, match=r"give `sampler=make_sampler\(temp=0.5\)`"):
            call(prompt="One", temp=0.5)
        with pytest.raises(TypeError, match="apply the chat template"):
            call(prompt=message)
    with pytest.raises(TypeError, match=r"give `sampler=make_sampler\(top_p=0.9\)`"):
        mlx_flashhead.batch_generate(model, tokenizer, [[1]], top_p=0.9)
    for function in (mlx_flashhead.stream_generate, mlx_flashhead.generate):
        kwargs = inspect.signature(function).parameters["kwargs"]
        assert get_args(kwargs.annotation)[0].__annotations__.keys() >= {"sampler", "kv_bits"}


def test_messages_are_no_prompt():
    for prompt in ("text", [1, 2], [], (5,)):
        check_prompt(prompt)
    message = {"role": "user", "content": "Hello"}
    for prompt in (message, [message], (message,)):
        with pytest.raises(TypeError, match="messages: apply the chat template"):
            check_prompt(prompt)
