"""Text within a grammar, in each of mlx-lm's loops, of tiny models that know nothing."""

import json
import re
from unittest.mock import Mock

import jsonschema
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from always_guessing import guess_always
from mlx_flashhead import batch_generate, generate, grammar_processor, stream_generate
from mlx_flashhead.structured.grammar import LIMITS, Grammar
from mlx_flashhead.structured.processor import GrammarProcessor
from model_folders import VOCAB_SIZE, write_model
from tiny_models import install_index, tiny_index, tiny_model

EOS = 1
FIELDS = {
    "name": {"type": "string", "maxLength": 8},
    "kind": {"enum": ["red", "green", None, 4]},
    "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS]}
SCHEMA |= {"additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return mlx_lm.load(str(write_model(tmp_path_factory.mktemp("models") / "llama")))[1]


@pytest.fixture(scope="module")
def flash():
    model = tiny_model(vocab_size=VOCAB_SIZE)
    install_index(model, tiny_index(model, n_probes=3))
    return model


LARK = 'start: "<" word ("," word)? ">"\nword: /[a-c]{2}/'


@pytest.mark.parametrize(
    "form, expected",
    [
        ({"regex": "[0-9]{3}-(ab|xyz){2}"}, "[0-9]{3}-(ab|xyz){2}"),
        ({"grammar": LARK}, "<[a-c]{2}(,[a-c]{2})?>"),
        ({"json_schema": {"const": [1, {"a": True}]}}, r'\[\s*1\s*,\s*{\s*"a"\s*:\s*true\s*}\s*]'),
    ],
)
def test_text_ends_where_the_grammar_ends(flash, tokenizer, form, expected):
    processor = grammar_processor(tokenizer, **form)
    options = {"max_tokens": 60, "logits_processors": [processor]}
    responses = list(stream_generate(flash, tokenizer, "hello", **options))
    assert responses[-1].finish_reason == "stop" and responses[-1].token == EOS
    text = "".join(response.text for response in responses)
    assert processor.accepts(text) and re.fullmatch(expected, text)


def test_no_space_without_end(tokenizer):
    processor = grammar_processor(tokenizer, json_schema={"type": "object"})
    for text in ('{"a": 1}', '{"a":1}', '{\n  "a": [\n    1\n  ]\n}', "{ }"):
        assert processor.accepts(text)
    for text in ('{"a":   1}', '{\n\n\n"a": 1}', '{"a": 1} ', "[]"):
        assert not processor.accepts(text)


@pytest.mark.parametrize("form", [{"regex": "[0-9]{1,3}"}, {"json_schema": {"type": "integer"}}])
def test_guesses_beyond_the_form_are_no_problem_of_the_text(flash, tokenizer, form, monkeypatch):
    """Of a draft model, which knows of no form, at the end of the text and before."""
    guess_always(monkeypatch)
    texts = []
    for draft in (None, tiny_model(vocab_size=VOCAB_SIZE, seed=3, num_hidden_layers=1)):
        processor = grammar_processor(tokenizer, **form)
        options = {"max_tokens": 40, "logits_processors": [processor], "draft_model": draft}
        found = list(stream_generate(flash, tokenizer, "hello", **options))
        texts.append([each.token for each in found])
        assert processor.problem is None
    assert texts[0] == texts[1]


def test_as_many_guesses_as_a_form_allows(tokenizer):
    processor = grammar_processor(tokenizer, regex="ab?")
    prompt = mx.array([5, 9])
    assert processor.allowed(prompt, VOCAB_SIZE) is not None
    a, b, c = (tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "abc")
    for guessed, n in (([a, b, EOS, a], 3), ([a, EOS, EOS], 2), ([c, a], 0), ([a, c, b], 1)):
        assert processor.n_allowed(prompt, guessed, VOCAB_SIZE) == n
        assert processor.problem is None


def test_tokens_that_a_grammar_forces_are_guessed(flash, tokenizer):
    """Several of them in a step: the text is the same."""
    word = "a_name_of_many_letters"
    schema = {"type": "array", "items": {"const": word}, "minItems": 2, "maxItems": 2}
    texts = []
    for lookup in ("off", "on"):
        processor = grammar_processor(tokenizer, json_schema=schema)
        options = {"max_tokens": 80, "logits_processors": [processor], "lookup": lookup}
        found = list(stream_generate(flash, tokenizer, "hello", **options))
        texts.append("".join(each.text for each in found))
        n_guessed = sum(each.from_draft for each in found)
        assert (n_guessed >= len(word)) == (lookup == "on")
    assert texts[0] == texts[1] and json.loads(texts[0]) == [word, word]


def test_batch(flash, tokenizer):
    """Each sequence follows the grammar from its own beginning."""
    ids = [tokenizer.encode(prompt) for prompt in ("a", "bb", "same", "same")]
    processor = grammar_processor(tokenizer, json_schema=SCHEMA)
    options = {"max_tokens": 200, "logits_processors": [processor]}
    found = batch_generate(flash, tokenizer, ids, prefill_batch_size=2, **options)
    for prompt, text in zip(ids, found.texts, strict=True):
        assert processor.accepts(text) and jsonschema.validate(json.loads(text), SCHEMA) is None
        assert text == generate(flash, tokenizer, prompt, **options)


def allowed(processor, tokens):
    logits = processor(mx.array(tokens), mx.zeros((1, VOCAB_SIZE + 5)))
    return {*np.flatnonzero(np.isfinite(np.array(logits[0])))}


def test_masks_follow_the_tokens_back_and_forth(tokenizer):
    a, b, c = (tokenizer.encode(letter)[-1] for letter in "abc")
    processor = grammar_processor(tokenizer, regex="ab?c")
    for text, following in (
        ([], {a}),
        ([a], {b, c}),
        ([a, b], {c}),
        ([a], {b, c}),
        ([a, c], {EOS}),
        ([a, c, EOS], {EOS}),
        ([a, b, c], {EOS}),
        ([], {a}),
    ):
        assert allowed(processor, [7, 8, *text]) == following and processor.problem is None
    # So it is where another processor has ruled out all that the grammar allows.
    assert allowed(processor, [7, 8, c]) == {EOS}
    assert f"the token {c} is not allowed" in processor.problem
    assert allowed(processor, [7, 8, c, EOS]) == {EOS} and processor.problem
    assert allowed(processor, [7, 8, a, c]) == {EOS} and processor.problem is None
    processor.begin()
    assert allowed(processor, [7, 8, a, b]) == {a}


def test_text_that_begins_after_a_thought(tokenizer):
    a, b = (tokenizer.encode(letter)[-1] for letter in "ab")
    begun_by_prompt = ("", tokenizer.decode([20, 21]))
    processor = GrammarProcessor(tokenizer, Grammar.from_regex("ab"), thought=begun_by_prompt)
    # The text must come before the end.
    all_but_the_end = {*range(VOCAB_SIZE)} - {EOS}
    for tokens, following in (
        ([], all_but_the_end),
        ([20], all_but_the_end),
        ([20, 20], all_but_the_end),
        ([21, 20, a], all_but_the_end),
        ([20, 20, 21], {a}),
        ([20, 20, 21, a], {b}),
        ([20, 21, a, b, 20, 21], {EOS}),
        ([20], all_but_the_end),
    ):
        assert allowed(processor, [7, 21, *tokens]) == following


def ambiguous(longest):
    """A grammar in which a text of many "a" has many derivations."""
    sequences = [" ".join(["s"] * n) for n in range(2, longest + 1)]
    choices = " | ".join(sequences)
    return Grammar.from_lark(f'start: "x"? s\ns: {choices} | "a"')


def test_masks_that_take_long_end_the_texts(tokenizer):
    """Those of this grammar take more and more. Several texts of one request share the time."""
    (a,) = tokenizer.encode("a")
    processor = GrammarProcessor(tokenizer, ambiguous(3), seconds_per_mask=1e-6)
    other = processor.for_text()
    assert a in allowed(other, [7])
    tokens = [7]
    while allowed(processor, tokens) != {EOS} and len(tokens) < 500:
        tokens.append(a)
    assert len(tokens) > 10 and "take more than 1e-06 s each" in processor.problem
    assert allowed(other, [7, a]) == {EOS} and other.problem == processor.problem
    # A loop does so when its text begins.
    other.begin()
    assert allowed(other, [7]) == {EOS}


def test_one_mask_has_a_limit_of_items(tokenizer, monkeypatch):
    (a,) = tokenizer.encode("a")
    monkeypatch.setitem(LIMITS, "step_max_items", 1000)
    processor = GrammarProcessor(tokenizer, ambiguous(16))

    def n_until_the_end():
        for n in range(500):
            if allowed(processor, [7, *[a] * n]) == {EOS}:
                return n
        raise AssertionError("no mask has a limit")

    n = n_until_the_end()
    assert "limit 1000" in processor.problem
    processor.begin()
    assert n_until_the_end() == n
    # What was only a guess, as in speculation, is gone.
    assert a in allowed(processor, [7, a])
    assert a in allowed(processor, [7, *[a] * (n - 2)]) and processor.problem is None
    monkeypatch.setitem(LIMITS, "step_max_items", 10)
    with pytest.raises(ValueError, match="too ambiguous to be followed"):
        ambiguous(17)


def test_mistakes_of_a_call(tokenizer):
    for forms in ({}, {"regex": "a", "grammar": 'start: "a"'}):
        with pytest.raises(ValueError, match="Give one of"):
            grammar_processor(tokenizer, **forms)
    slow = Mock(spec=["eos_token_id"])
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        grammar_processor(slow, regex="a")
