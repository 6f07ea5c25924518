"""Parts of an answer, what is held back for them, and tokens' names and log-probabilities."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tokenizers import decoders

from mlx_flashhead.models.compat.mlx_lm import TextStateMachine
from mlx_flashhead.serving.completions import (
    VERY_UNLIKELY,
    AnswerText,
    Token,
    TokenNames,
    token_logprobs,
)
from model_folders import EOS


class Detokenizer:
    """Tokens are texts."""

    last_segment = ""

    def add_token(self, token):
        self.last_segment = token

    def finalize(self):
        self.last_segment = ""


def told(parts, stop=(), state="normal"):
    """What each token adds, and the end, unless a stop text came before it."""
    tokenizer = SimpleNamespace(
        detokenizer=Detokenizer(),
        has_thinking=True,
        think_start="<think>",
        think_end="</think>",
        has_tool_calling=True,
        tool_call_start="<call>",
        tool_call_end="</call>",
        structural_markers=(),
        response_transitions={},
    )
    machine = TextStateMachine({"normal": [(word, None) for word in stop]} if stop else None)
    text = AnswerText(tokenizer, machine, state)
    given = []
    for part in parts:
        given.append(text.add(part))
        if given[-1].finish_reason:
            return given
    return [*given, text.finish()]


def whole(given):
    answer = Token()
    for one in given:
        answer.add(one)
    return answer


@pytest.mark.parametrize(
    "parts, stop, expected, ended",
    [
        ("ab cd ef", "", Token("abcdef"), False),
        ("ab cd ef", "cd", Token("ab"), True),
        ("ab cd ef", "bc", Token("a"), True),
        ("ab cd ef", "de bc", Token("a"), True),
        ("ab cd ef", "f", Token("abcde"), True),
        ("ab cd ef", "abcdef", Token(), True),
        ("ab cd ef", "fg", Token("abcdef"), False),  # held back until it is certain
        ("ab cd ef", "x", Token("abcdef"), False),
        ("<thi nk>Hm m.</think> Yes", "", Token("Yes", "Hmm."), False),
        ("<think>Hm m.</think> Yes", "mm", Token("", "H"), True),
        ("<call>f( 1) </call> and <call>g()</call>", "", Token("and", "", ["f(1)", "g()"]), False),
        ("<call>f( 1", "", Token("", "", ["f(1"]), False),  # cut off
        # what was held back is text after all, and a call is as long as it is
        ("a<cal .b", ".", Token("a<cal"), True),
        ("<call>f( 1.5)", ".", Token("", "", ["f(1"]), True),
        ("a<cal f>b<ca", "", Token("a<calf>b<ca"), False),
    ],
)  # fmt: skip
def test_parts_of_an_answer(parts, stop, expected, ended):
    answer = whole(told(parts.split(), stop.split()))
    assert answer == replace(expected, finish_reason="stop" if ended else None)


def test_an_answer_may_begin_with_a_thought():
    answer = whole(told(["Hm.", "</think>Yes"], state="reasoning"))
    assert answer == Token("Yes", "Hm.")


def test_what_is_not_certain_is_held_back():
    """What may begin a stop text, and the beginning of a call."""
    given = told(["a", "b", "x"], ["bc"])
    assert [one.content for one in given] == ["a", "", "bx", ""]
    given = told(["Look: <call>f(", "1)", "</call>", " and", "<call>g()</call>"])
    assert [one.calls for one in given] == [[], [], ["f(1)"], [], ["g()"], []]


def test_bytes_of_a_byte_level_tokenizer(tiny):
    names = TokenNames(tiny.tokenizer)
    tokens = tiny.tokenizer.encode("aé €\n", add_special_tokens=False)
    assert b"".join(map(names.bytes, tokens)) == "aé €\n".encode()
    assert names.text(tokens[0]) == "a"
    assert names.text(tokens[1]) == "bytes:\\xc3"
    assert {names.bytes(i) for i in range(2, 258)} == {bytes([i]) for i in range(256)}
    assert names.text(1) == EOS
    assert names.bytes(5000) == b""


def test_bytes_of_a_sentencepiece_tokenizer():
    vocabulary = ["▁the", "<0xE2>", "e", "é", "<s>"]
    fallback = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer = SimpleNamespace(
        is_fast=True,
        backend_tokenizer=SimpleNamespace(decoder=fallback),
        convert_ids_to_tokens=lambda i: vocabulary[i],
        added_tokens_decoder={4: None},
    )
    names = TokenNames(tokenizer)
    expected = [b" the", b"\xe2", b"e", "é".encode(), b"<s>"]
    assert [names.bytes(i) for i in range(5)] == expected


@pytest.mark.parametrize(
    "token, n_tops, expected",
    [
        (1, 3, [(1, -3.0), (2, -0.5), (0, -1.0), (1, -3.0)]),
        (3, 0, [(3, VERY_UNLIKELY)]),
        (0, 20, [(0, -1.0), (2, -0.5), (0, -1.0), (1, -3.0), (3, VERY_UNLIKELY)]),
    ],
)
def test_logprobs_of_the_chosen_and_the_likeliest(token, n_tops, expected):
    logprobs = mx.array([-1.0, -3.0, -0.5, -float("inf")])
    assert token_logprobs(logprobs, token, n_tops) == expected
