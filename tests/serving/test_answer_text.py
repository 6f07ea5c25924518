"""Parts of an answer, what is held back for them, tokens' names and logprobs, and strict JSON."""

import math
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tokenizers import decoders

from engines import checked
from mlx_flashhead.serving.answer_text import (
    VERY_UNLIKELY,
    AnswerText,
    Token,
    stop_machine,
    token_logprobs,
)
from mlx_flashhead.serving.bodies import read_json, write_json
from mlx_flashhead.serving.choices import Choice, token_bytes, token_text
from model_folders import EOS


class Detokenizer:
    """Tokens are texts."""

    last_segment = ""

    def add_token(self, token):
        self.last_segment = token

    def finalize(self):
        self.last_segment = ""


def emitted(parts, stop=(), state="normal"):
    """What each token adds, and the end, unless a stop text came before it."""
    tokenizer = SimpleNamespace(detokenizer=Detokenizer(), has_thinking=True, has_tool_calling=True)
    tokenizer.think_start = "<think>"
    tokenizer.think_end = "</think>"
    tokenizer.tool_call_start = "<call>"
    tokenizer.tool_call_end = "</call>"
    tokenizer.structural_markers = ()
    tokenizer.response_transitions = {}
    machine = stop_machine(stop)
    text = AnswerText(tokenizer, machine, state)
    tokens = []
    for part in [*parts, None]:
        tokens.append(text.add(part, last=part is None))
        if tokens[-1].finish_reason:
            break
    return tokens


@pytest.mark.parametrize(
    "parts, stop, expected, ended",
    [
        ("ab cd ef", "", Token("abcdef"), False),
        ("ab cd ef", "cd", Token("ab"), True),
        ("ab cd ef", "de bc", Token("a"), True),
        ("ab cd ef", "abcdef", Token(), True),
        # The "f" is held back until it is certain to be text.
        ("ab cd ef", "fg x", Token("abcdef"), False),
        ("<thi nk>Hm m.</think> Yes", "", Token("Yes", "Hmm."), False),
        ("<think>Hm m.</think> Yes", "mm", Token("", "H"), True),
        ("<call>f( 1) </call> and <call>g()</call>", "", Token("and", "", ["f(1)", "g()"]), False),
        # The tokens end within a call.
        ("<call>f( 1", "", Token("", "", ["f(1"]), False),
        # What was held back is text after all, and a call is as long as it is.
        ("a<cal .b", ".", Token("a<cal"), True),
        # A call that a stop text ends is none.
        ("<call>f( 1.5)", ".", Token("f(1"), True),
        ("a<cal f>b<ca", "", Token("a<calf>b<ca"), False),
    ],
)
def test_parts_of_an_answer(parts, stop, expected, ended):
    answer = Token()
    for token in emitted(parts.split(), stop.split()):
        answer.add(token)
    assert (answer.stop_text in stop.split()) == ended
    finish_reason = "stop" if ended else None
    assert answer == replace(expected, finish_reason=finish_reason, stop_text=answer.stop_text)


def test_what_is_not_certain_is_held_back():
    """What may begin a stop text, and the beginning of a call."""
    assert [token.content for token in emitted(["a", "b", "x"], ["bc"])] == ["a", "", "bx", ""]
    tokens = emitted(["Look: <call>f(", "1)", "</call>", " and", "<call>g()</call>"])
    assert [token.calls for token in tokens] == [[], [], ["f(1)"], [], ["g()"], []]
    first, second, _ = emitted(["Hm.", "</think>Yes"], state="reasoning")
    assert (first.reasoning, second) == ("Hm.", Token("Yes"))


def test_bytes_of_a_byte_level_tokenizer(tiny):
    tokenizer = tiny.tokenizer
    tokens = tokenizer.encode("aé", add_special_tokens=False)
    assert [token_text(tokenizer, token) for token in (*tokens[:2], 1)] == ["a", "bytes:\\xc3", EOS]
    assert {token_bytes(tokenizer, i) for i in range(2, 258)} == {bytes([i]) for i in range(256)}
    assert token_bytes(tokenizer, 5000) == b""


def test_bytes_of_a_sentencepiece_tokenizer():
    vocabulary = ["▁the", "<0xE2>", "e", "é", "<s>"]
    fallback = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer = SimpleNamespace(
        is_fast=True,
        backend_tokenizer=SimpleNamespace(decoder=fallback),
        convert_ids_to_tokens=lambda i: vocabulary[i],
        added_tokens_decoder={4: None},
    )
    expected = [b" the", b"\xe2", b"e", "é".encode(), b"<s>"]
    assert [token_bytes(tokenizer, i) for i in range(5)] == expected


def test_logprobs_of_the_chosen_and_the_likeliest():
    logprobs = mx.array([-1.0, -3.0, -0.5, -float("inf")])
    tops = [(2, -0.5), (0, -1.0), (1, -3.0), (3, VERY_UNLIKELY)]
    assert token_logprobs(logprobs, 1, 3) == [(1, -3.0), *tops[:3]]
    assert token_logprobs(logprobs, 3, 0) == [(3, VERY_UNLIKELY)]
    assert token_logprobs(logprobs, 0, 20) == [(0, -1.0), *tops]


def test_json_that_is_written_can_be_read():
    """Numbers that are not finite become null, and halves of characters can be sent."""
    value = {"a": math.inf, "b": [math.nan, (-math.inf,)], "c": [1.5, "é", None, True]}
    written = {"a": None, "b": [None, [None]], "c": [1.5, "é", None, True]}
    assert read_json(write_json(value).encode()) == written
    assert write_json("\ud800").encode() == b'"\\ud800"'
    assert read_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_half_of_a_character_is_read_as_browsers_write_it():
    assert read_json(b'{"a\\udc00": ["x\\ud83d", "\\ud83d\\ude00", 1.5, null]}') == {
        "a\ufffd": ["x\ufffd", "\U0001f600", 1.5, None]
    }


@pytest.mark.parametrize(
    "text, said",
    [
        (b'{"a": NaN}', "invalid character"),
        (b"1e999", "out of range"),
        (b'"\xff"', "Invalid UTF-8"),
        (b'"\xed\xa0\x80"', "Invalid UTF-8"),
        (b'{"a":[' * 51 + b"]}" * 51, "nested too deeply"),
        (b"1" * 5000, "out of range"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_not_strict_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        read_json(text)


def test_a_thought_has_the_names_that_clients_look_for(tiny):
    request = checked(tiny, {"messages": [{"role": "user", "content": "x"}]})
    choice = Choice(request, 0)
    named = {"reasoning": "Hm.", "reasoning_content": "Hm."}
    delta = choice.add(Token(reasoning="Hm."))["delta"]
    assert delta == {"role": "assistant", "content": "", **named}
    assert choice.add(Token("Yes.", finish_reason="stop"))["delta"] == {"content": "Yes."}
    message = choice.whole()["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None, **named}
