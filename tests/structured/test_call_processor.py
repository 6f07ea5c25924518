"""A text with calls, token by token: free up to a call's mark, then held to the grammar."""

import random

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from call_formats import of, tokenizer_of, tool
from mlx_flashhead import generate
from mlx_flashhead.decoding.sampling import make_sampler
from mlx_flashhead.structured.grammar import Grammar
from mlx_flashhead.structured.processor import GrammarProcessor
from mlx_flashhead.structured.tool_grammar import tool_calls
from tiny_models import install_index, tiny_index, tiny_model

EOS = 1
COLOUR = tool("paint", of(["colour"], colour={"enum": ["red", "blue"]}))
CALL = '{"name": "paint", "arguments": {"colour": "red"}}'
MARKED = f"<tool_call>{CALL}</tool_call>"


def processor_of(tokenizer, tools=(COLOUR,), grammar=None, *, several=True, **options):
    calls = tool_calls(tokenizer, tools, several=several)
    made = GrammarProcessor(tokenizer, grammar, calls=calls, **options)
    prompt = [0]
    made(prompt, mx.zeros((1, made._vocabulary.size)))
    return made


def allowed(processor, tokens):
    """The tokens that may follow; None for all of them. The logits are masked likewise."""
    size = processor._vocabulary.size
    words = processor.allowed([0, *tokens], size)
    if words is None:
        return None
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:size]
    logits = processor([0, *tokens], mx.zeros((1, size)))
    found = {*np.flatnonzero(bits).tolist()}
    assert found == {*np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist()}
    return found


def ids(tokenizer, *texts):
    """One token for each text of several letters that is one, else a token a byte."""
    vocabulary = tokenizer.get_vocab()
    found = []
    for text in texts:
        whole = vocabulary.get(text.replace("\n", "Ċ").replace(" ", "Ġ"))
        if whole is None:
            found += tokenizer.encode(text, add_special_tokens=False)
        else:
            found.append(whole)
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["token", "text"])
def test_free_up_to_the_mark_and_after_the_call(plain):
    tokenizer = tokenizer_of("json_tools", plain=plain)
    processor = processor_of(tokenizer)
    before = ids(tokenizer, "Well, <tool")
    call = ids(tokenizer, MARKED)
    assert allowed(processor, before) is None
    tokens = [*before, *call]
    for end in range(len(before), len(tokens)):
        following = allowed(processor, tokens[:end])
        assert following is None or tokens[end] in following
        if tokenizer.decode(tokens[len(before) : end]).startswith("<tool_call>{"):
            assert following is not None and len(following) < 100
    assert allowed(processor, tokens) is None and processor.problem is None
    assert allowed(processor, [*tokens, *ids(tokenizer, " Done.")]) is None
    second = [*tokens, *ids(tokenizer, "<tool_call>")]
    assert allowed(processor, second) <= {*ids(tokenizer, "{", " ", "\n", "\n\n")}
    processor = processor_of(tokenizer, several=False)
    assert allowed(processor, tokens) == {EOS}


def test_a_token_that_completes_the_mark_goes_on_as_a_call_does():
    """``l_call>{`` after ``<too``: right where JSON follows, wrong where a tag does."""
    for parser, right in (("json_tools", True), ("qwen3_coder", False)):
        tokenizer = tokenizer_of(parser, plain=True)
        processor = processor_of(tokenizer)
        begun = ids(tokenizer, "a <too")
        token = ids(tokenizer, "l_call>{")
        following = allowed(processor, begun)
        if following is None:
            assert right
        else:
            assert (token[0] in following) == right
            assert len(following) > 250
        if right:
            assert ids(tokenizer, '"')[0] in allowed(processor, [*begun, *token])
            assert len(allowed(processor, [*begun, *token])) < 20
    whole = ids(tokenizer_of("json_tools", plain=True), "x<tool_call>")
    assert len(allowed(processor_of(tokenizer_of("json_tools", plain=True)), whole)) < 20


def test_masks_follow_the_tokens_back_and_forth():
    tokenizer = tokenizer_of("json_tools")
    text = ids(tokenizer, "Hm ", MARKED, "\n", MARKED, " so")
    processor = processor_of(tokenizer)
    expected = [allowed(processor, text[:end]) for end in range(len(text) + 1)]
    draw = random.Random(1)
    for _ in range(60):
        end = draw.randrange(len(text) + 1)
        assert allowed(processor, text[:end]) == expected[end]
    other = processor.for_text()
    other([0], mx.zeros((1, other._vocabulary.size)))
    assert allowed(other, text[:9]) == expected[9]


def everything_but_the_end(tokenizer):
    """What a thought may go on with where a call must come after it."""
    return {*range(len(tokenizer))} - {EOS}


def test_a_required_call_is_first_but_for_a_thought():
    tokenizer = tokenizer_of("json_tools")
    mark, *_ = ids(tokenizer, "<tool_call>")
    space = {*ids(tokenizer, " ", "\n", "\n\n", "  ")}
    processor = processor_of(tokenizer, required=True)
    assert mark in allowed(processor, []) <= {mark} | space
    after_call = allowed(processor, ids(tokenizer, MARKED))
    assert {mark, EOS} <= after_call <= {mark, EOS} | space
    thought = processor_of(tokenizer, required=True, thought=("[T]", "[/T]"))
    assert {mark, *ids(tokenizer, "[")} <= allowed(thought, [])
    begun = ids(tokenizer, "[T]Hm")
    assert allowed(thought, begun) == everything_but_the_end(tokenizer)
    thought_over = [*begun, *ids(tokenizer, "[/T]")]
    assert mark in allowed(thought, thought_over) <= {mark} | space
    # The prompt begins a thought. A call within it is one, as mlx-lm has it.
    end = ids(tokenizer, "[/T]")
    begun_by_prompt = processor_of(tokenizer, required=True, thought=("", "[/T]"))
    assert allowed(begun_by_prompt, ids(tokenizer, "Hm")) == everything_but_the_end(tokenizer)
    assert mark in allowed(begun_by_prompt, [*ids(tokenizer, "Hm"), *end]) <= {mark} | space
    assert len(allowed(begun_by_prompt, ids(tokenizer, "Hm<tool_call>"))) < 20


def test_a_form_beside_calls():
    tokenizer = tokenizer_of("json_tools", plain=True)
    grammar = Grammar.from_json_schema({"type": "array", "items": {"type": "string"}})
    processor = processor_of(tokenizer, grammar=grammar)
    assert {*ids(tokenizer, "[", "<")} <= allowed(processor, [])
    assert {*ids(tokenizer, "<", '"')} <= allowed(processor, ids(tokenizer, '["<'))
    assert allowed(processor, ids(tokenizer, '["a"]')) == {EOS}
    assert EOS in allowed(processor, ids(tokenizer, MARKED))


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_text_is_that_of_plain_mlx_lm(temperature):
    """With the same processor, in mlx-lm's own loop and model."""
    tokenizer = tokenizer_of("json_tools")
    city = tool("weather", of(["city"], city={"type": "string", "maxLength": 6}))

    def text(write, model):
        processor = GrammarProcessor(
            tokenizer,
            calls=tool_calls(tokenizer, [city, COLOUR], several=False),
            required=True,
        )
        sampler = make_sampler(temp=temperature, seed=5)
        prompt = ids(tokenizer, "hello")
        options = {"max_tokens": 120, "sampler": sampler, "logits_processors": [processor]}
        return write(model, tokenizer, prompt, **options)

    plain = tiny_model(vocab_size=len(tokenizer))
    flash = tiny_model(vocab_size=len(tokenizer))
    install_index(flash, tiny_index(flash, n_probes=3))
    expected = text(mlx_lm.generate, plain)
    assert "paint" in expected or "weather" in expected
    assert text(generate, flash) == expected


@pytest.mark.parametrize("parser", ["json_tools", "kimi_k3"])
def test_a_free_text_may_have_any_tokens(parser):
    """Parts of characters, and special tokens but the mark of a call, also where it begins."""
    tokenizer = tokenizer_of(parser)
    processor = processor_of(tokenizer)
    begun = {"json_tools": "<tool_", "kimi_k3": "<|open|>"}[parser]
    for text in ("\xc3", "\xa9\xa9", "\xc3a", "a", "<s>", begun, begun + "x"):
        if text.isascii():
            tokens = ids(tokenizer, text)
        else:
            # Each character stands for a byte.
            tokens = ids(tokenizer, *text)
        assert allowed(processor, tokens) is None, text
        assert processor.problem is None


def forced(processor, tokens, most=99):
    """The tokens that must follow. Asking for them leaves the state as it was."""
    before = allowed(processor, tokens)
    found = processor.forced_tokens([0, *tokens], most)
    assert allowed(processor, tokens) == before
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["token", "text"])
def test_forced_tokens_are_those_that_the_masks_allow(plain):
    tokenizer = tokenizer_of("json_tools", plain=plain)
    ping = tool("a_tool_with_a_long_name", of(["number_of_times"], number_of_times={"const": 12}))
    processor = processor_of(tokenizer, [ping], required=True)
    tokens = ids(tokenizer, "<tool_call>")
    n_forced = 0
    while EOS not in allowed(processor, tokens):
        guessed = forced(processor, tokens)
        assert guessed == forced(processor, tokens, 3) + guessed[3:]
        for token in guessed:
            assert allowed(processor, tokens) == {token}
            tokens.append(token)
        n_forced += len(guessed)
        if not guessed:
            rest = (
                '{"name":"a_tool_with_a_long_name","arguments":{"number_of_times":12}}</tool_call>'
            )
            following = allowed(processor, tokens)
            assert len(following) > 1
            fitting = [token for token in ids(tokenizer, rest) if token in following]
            tokens.append(fitting[0])
    assert n_forced > 30 and forced(processor, tokens) == []
    assert forced(processor_of(tokenizer, [ping]), ids(tokenizer, "Well")) == []
    stray = [*ids(tokenizer, "<tool_call>"), *ids(tokenizer, "x")]
    assert forced(processor, stray) == []
