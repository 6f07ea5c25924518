"""The parts of an answer: stop texts, thoughts, calls, and what is held back for them."""

from types import SimpleNamespace

import pytest

from mlx_flashhead.serving.protocol.answer_text import AnswerText, Piece


class Detokenizer:
    """Tokens are texts."""

    last_segment = ""

    def add_token(self, token):
        self.last_segment = token

    def finalize(self):
        self.last_segment = ""


def told(parts, stop=(), state="normal"):
    """Pieces of all tokens but the last, which ends the answer, and whether a stop text did."""
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
    pieces = []
    for part in parts:
        piece, stopped = text.add(part)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = text.finish()
    return [*pieces, piece], stopped


@pytest.mark.parametrize(
    "parts, stop, expected, ended",
    [
        ("ab cd ef", "", Piece("abcdef"), False),
        ("ab cd ef", "cd", Piece("ab"), True),
        ("ab cd ef", "bc", Piece("a"), True),
        ("ab cd ef", "de bc", Piece("a"), True),
        ("ab cd ef", "f", Piece("abcde"), True),
        ("ab cd ef", "abcdef", Piece(), True),
        ("ab cd ef", "fg", Piece("abcdef"), False),  # held back until it is certain
        ("ab cd ef", "x", Piece("abcdef"), False),
        ("<thi nk>Hm m.</think> Yes", "", Piece("Yes", "Hmm."), False),
        ("<think>Hm m.</think> Yes", "mm", Piece("", "H"), True),
        ("<call>f( 1) </call> and <call>g()</call>", "", Piece("and", "", ["f(1)", "g()"]), False),
        ("<call>f( 1", "", Piece("", "", ["f(1"]), False),  # cut off
        # what was held back is text after all, and a call is as long as it is
        ("a<cal .b", ".", Piece("a<cal"), True),
        ("<call>f( 1.5)", ".", Piece("", "", ["f(1"]), True),
        ("a<cal f>b<ca", "", Piece("a<calf>b<ca"), False),
    ],
)  # fmt: skip
def test_parts_of_an_answer(parts, stop, expected, ended):
    pieces, stopped = told(parts.split(), stop.split())
    assert (sum(pieces, Piece()), stopped) == (expected, ended)


def test_an_answer_may_begin_with_a_thought():
    pieces, _ = told(["Hm.", "</think>Yes"], state="reasoning")
    assert sum(pieces, Piece()) == Piece("Yes", "Hm.")


def test_what_is_not_certain_is_held_back():
    """What may begin a stop text, and the beginning of a call."""
    pieces, _ = told(["a", "b", "x"], ["bc"])
    assert [piece.content for piece in pieces] == ["a", "", "bx", ""]
    pieces, _ = told(["Look: <call>f(", "1)", "</call>", " and", "<call>g()</call>"])
    assert [piece.calls for piece in pieces] == [[], [], ["f(1)"], [], ["g()"], []]
