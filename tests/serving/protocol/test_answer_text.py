"""The parts of an answer: stop texts, thoughts, calls, and what is held back for them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_flashhead.serving.protocol.answer_text import AnswerText, Token


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
    text = AnswerText(SimpleNamespace(tokenizer=tokenizer), tuple(stop), state)
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
