"""Calls of tools: whatever a grammar allows, mlx-lm's parser reads, and it follows its schema."""

import random
from itertools import product

import jsonschema
import numpy as np
import pytest

from call_formats import MERGED, NESTED, PARSERS, SIMPLE, of, tokenizer_of, tool
from mlx_flashhead.models.compat.mlx_lm import TextStateMachine, make_text_state_machine
from mlx_flashhead.structured.call_format import Gemma, ListedFormat
from mlx_flashhead.structured.processor import GrammarProcessor
from mlx_flashhead.structured.tool_formats import CALL_FORMATS
from mlx_flashhead.structured.tool_grammar import tool_calls, tools_for_parser

EOS = 1
# What a text may try to end with, wherever it is.
JSON_ENDINGS = ('"', '"}', '"}}', "null", "}", "]")
ENDINGS = (
    *JSON_ENDINGS,
    *("</parameter>", "\n</parameter>\n", "</function>", "</param>"),
    *("]]></param>", "</invoke>", "</tool_call>", "<escape>", '<|"|>', '<|"|>}', "<tool_call|>"),
    *("</arg_value>", "</longcat_arg_value>", "</longcat_tool_call>", "</atem:parameter>"),
    *("</atem:invoke>", "</atem:function_calls>", "</minimax:tool_call>", "<end_function_call>"),
    *("<|close|>argument<|sep|>", "<|close|>call<|sep|>", "<|close|>tools<|sep|>"),
    *("<|tool_call_end|>", "<|tool_calls_section_end|>", ")]<|tool_call_end|>"),
)
# Tools whose strings stand as they are in a format that has such ones.
OF_TEXTS = ("get_weather", "note")


class Walk:
    """A text of random tokens, each of which a processor allows."""

    def __init__(self, tokenizer, processor, seed, endings=JSON_ENDINGS):
        self.tokens = []
        self._endings = endings
        self._tokenizer = tokenizer
        self._processor = processor
        self._random = random.Random(seed)
        self._ending = []
        self._processor.begin()
        prompt = [0]
        self._processor.allowed(prompt, 300)

    def go(self, most=400):
        """Adds tokens until the end, or as many; whether it has ended."""
        for _ in range(most):
            token = self._draw(allowed(self._processor, [0, *self.tokens]))
            if token == EOS:
                return True
            self.tokens.append(token)
        return False

    def _draw(self, tokens):
        if EOS in tokens and self._random.random() < 0.7:
            return EOS
        if not self._ending and self._random.random() < 0.2:
            text = self._random.choice(self._endings)
            self._ending = self._tokenizer.encode(text, add_special_tokens=False)
        if self._ending and self._ending[0] in tokens:
            return self._ending.pop(0)
        self._ending = []
        return self._random.choice(tokens)

    @property
    def text(self):
        return self._tokenizer.decode(self.tokens)


def allowed(processor, tokens):
    """The tokens that may follow, in order. The grammar has been followed so far."""
    size = processor._vocabulary.size
    words = processor.allowed(tokens, size)
    assert processor.problem is None
    if words is None:
        return list(range(size))
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def calls_in(tokenizer, text, tools):
    """The calls and the other text, as mlx-lm's server takes a text apart."""
    state, parts = TextStateMachine.split(make_text_state_machine(tokenizer).make_state(), text)
    _, held, last = TextStateMachine.flush(state)
    sections = []
    section = ""
    content = ""
    for name, part in [*parts, (last, held), ("normal", "")]:
        if name == "tool":
            section += part
        else:
            content += part
            if section:
                sections.append(section)
            section = ""
    found = []
    for section in sections:
        read = tokenizer.tool_parser(section, tools_for_parser(tokenizer, tools))
        if isinstance(read, list):
            found += read
        else:
            found.append(read)
    return found, content


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "plain"])
@pytest.mark.parametrize("parser", PARSERS)
def test_random_calls_are_valid(parser, plain):
    """With marks as tokens of their own and as plain text."""
    tokenizer = tokenizer_of(parser, plain=plain)
    call_format = CALL_FORMATS[parser]
    tools = SIMPLE if parser == "function_gemma" else NESTED
    if not isinstance(call_format, ListedFormat):
        tools = [*tools, MERGED]
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    has_texts = isinstance(call_format, Gemma) or getattr(call_format, "plain", False)
    called = set()
    for (name, schema), seed in product(schemas.items(), range(3)):
        only = [each for each in tools if each["function"]["name"] == name]
        calls = tool_calls(tokenizer, only, several=False)
        endings = ENDINGS if has_texts and name in OF_TEXTS else JSON_ENDINGS
        processor = GrammarProcessor(tokenizer, calls=calls, required=True)
        walk = Walk(tokenizer, processor, seed, endings)
        if not walk.go():
            continue
        (call,), content = calls_in(tokenizer, walk.text, tools)
        assert call["name"] == name and not content.strip()
        jsonschema.validate(call["arguments"], schema)
        called.add(name)
    assert len(called) >= 4


@pytest.mark.parametrize("parser", PARSERS)
def test_a_mark_that_is_spelled_out_begins_a_call_too(parser):
    """As where a model writes the mark in other tokens than its own."""
    tokenizer = tokenizer_of(parser)
    pong = tool("pong", of(["n"], n={"type": "integer", "maximum": 9}))
    calls = tool_calls(tokenizer, [pong], several=False)
    processor = GrammarProcessor(tokenizer, calls=calls)
    walk = Walk(tokenizer, processor, 0)
    spell = processor._vocabulary.tokens.greedy_tokenize
    walk.tokens += spell("Look: " + calls.start)
    assert walk.go()
    (call,), content = calls_in(tokenizer, walk.text, [pong])
    assert call["name"] == "pong" and call["arguments"]["n"] <= 9
    assert content.startswith("Look: ")


@pytest.mark.parametrize("parser", PARSERS)
def test_sections_of_several_calls(parser):
    tokenizer = tokenizer_of(parser)
    pair = [tool("ping", of()), tool("pong", of(["n"], n={"type": "integer", "maximum": 9}))]
    calls = tool_calls(tokenizer, pair)
    numbers = set()
    for seed in range(16):
        walk = Walk(tokenizer, GrammarProcessor(tokenizer, calls=calls, required=True), seed)
        if not walk.go():
            continue
        found, content = calls_in(tokenizer, walk.text, pair)
        assert not content.strip()
        for call in found:
            assert call["name"] == "ping" or call["arguments"]["n"] <= 9
        numbers.add(len(found))
    assert numbers > {1}
