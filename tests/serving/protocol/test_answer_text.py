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


def tokenizer(**options):
    thinking = options.pop("thinking", False)
    calling = options.pop("calling", False)
    return SimpleNamespace(
        detokenizer=Detokenizer(),
        has_thinking=thinking,
        think_start="<think>",
        think_end="</think>",
        has_tool_calling=calling,
        tool_call_start="<call>",
        tool_call_end="</call>",
        structural_markers=(),
        response_transitions={},
    )


def told(parts, stop=(), state="normal", **options):
    """Pieces of all tokens but the last, which ends the answer, and whether a stop text did."""
    text = AnswerText(SimpleNamespace(tokenizer=tokenizer(**options)), tuple(stop), state)
    pieces = []
    for part in parts:
        piece, stopped = text.add(part)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = text.finish()
    return [*pieces, piece], stopped


def whole(pieces):
    return sum(pieces, Piece())


@pytest.mark.parametrize(
    "stop, content, stopped",
    [
        ([], "abcdef", False),
        (["cd"], "ab", True),
        (["bc"], "a", True),
        (["de", "bc"], "a", True),
        (["f"], "abcde", True),
        (["abcdef"], "", True),
        (["fg"], "abcdef", False),  # held back until it is certain
        (["x"], "abcdef", False),
    ],
)
def test_an_answer_ends_before_the_first_stop_text(stop, content, stopped):
    pieces, found = told(["ab", "cd", "ef"], stop)
    assert (whole(pieces).content, found) == (content, stopped)


def test_what_may_begin_a_stop_text_is_held_back():
    pieces, _ = told(["a", "b", "x"], ["bc"])
    assert [piece.content for piece in pieces] == ["a", "", "bx", ""]


def test_thoughts_are_apart():
    pieces, _ = told(["<thi", "nk>Hm", "m.</think>", "Yes"], thinking=True)
    assert whole(pieces) == Piece("Yes", "Hmm.", [])
    pieces, _ = told(["Hm.", "</think>Yes"], state="reasoning", thinking=True)
    assert whole(pieces) == Piece("Yes", "Hm.", [])


def test_a_stop_text_counts_within_thoughts_too():
    pieces, stopped = told(["<think>Hm", "m.</think>", "Yes"], ["mm"], thinking=True)
    assert (whole(pieces), stopped) == (Piece("", "H", []), True)


def test_calls_are_told_when_they_are_complete():
    pieces, _ = told(["Look: <call>f(", "1)", "</call>", " and", "<call>g()</call>"], calling=True)
    assert [piece.calls for piece in pieces] == [[], [], ["f(1)"], [], ["g()"], []]
    assert whole(pieces).content == "Look:  and"


def test_a_call_that_is_cut_off_is_told_as_far_as_it_is():
    pieces, _ = told(["<call>f(", "1"], calling=True)
    assert pieces[-1].calls == ["f(1"]


def test_a_stop_text_ends_what_was_held_back_as_well():
    """The beginning of a marker is text after all, and a call is as long as it is."""
    pieces, stopped = told(["a <cal", ".b"], ["."], calling=True)
    assert (whole(pieces), stopped) == (Piece("a <cal", "", []), True)
    pieces, stopped = told(["<call>f(", "1.5)"], ["."], calling=True)
    assert (whole(pieces), stopped) == (Piece("", "", ["f(1"]), True)


def test_what_looks_like_a_marker_and_is_none_is_text():
    pieces, _ = told(["a <cal", "f> b <ca"], calling=True)
    assert whole(pieces) == Piece("a <calf> b <ca", "", [])
