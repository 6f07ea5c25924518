"""From tokens to the parts of an answer: text, thoughts and calls of tools."""

from dataclasses import dataclass, field

from ...models.compat.generate import TextStateMachine, make_text_state_machine
from ..catalogue import ServedModel

_NORMAL, _REASONING, _TOOL = "normal", "reasoning", "tool"


@dataclass
class Piece:
    """A token's addition to an answer. Any part may be empty.

    Attributes:
        content: Text of the answer.
        reasoning: Text of a thought before it.
        calls: Complete calls of tools, as the model writes them.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[str] = field(default_factory=list)

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(
            self.content + other.content,
            self.reasoning + other.reasoning,
            self.calls + other.calls,
        )


class AnswerText:
    """The text of one answer, given out as soon as its part is certain.

    Args:
        served: The model.
        stop: Texts that end it.
        state: The state of the text at its beginning.
        keep_space: Whether a space at its beginning is part of it. mlx-lm's detokenizers drop one.
    """

    def __init__(
        self, served: ServedModel, stop: tuple[str, ...], state: str, keep_space: bool = False
    ):
        self._detokenizer = served.tokenizer.detokenizer
        if keep_space:
            # they keep a space that follows another word
            for token in served.tokenizer.encode("a", add_special_tokens=False):
                self._detokenizer.add_token(token)
            _ = self._detokenizer.last_segment
        machine = TextStateMachine({_NORMAL: [(word, None) for word in stop]} if stop else None)
        self._until_stop = machine.make_state()
        self._parts = make_text_state_machine(served.tokenizer).make_state(state)
        self._call = ""

    def add(self, token: int) -> tuple[Piece, bool]:
        """Adds a token. Returns the text that is certain now, and whether a stop text ended it."""
        self._detokenizer.add_token(token)
        return self._take(self._detokenizer.last_segment)

    def finish(self) -> tuple[Piece, bool]:
        """Ends the answer. Returns the text held back, and whether it held a stop text."""
        self._detokenizer.finalize()
        piece, stopped = self._take(self._detokenizer.last_segment)
        if not stopped:
            self._until_stop, held, _ = TextStateMachine.flush(self._until_stop)
            self._split(held, piece)
            piece += self._flush()
        return piece, stopped

    def _take(self, text: str) -> tuple[Piece, bool]:
        piece = Piece()
        self._until_stop, segments = TextStateMachine.split(self._until_stop, text)
        self._split(segments[0][1], piece)
        stopped = self._until_stop[0] is None
        return piece + self._flush() if stopped else piece, stopped

    def _flush(self) -> Piece:
        """Text held back as a possible beginning of a marker."""
        piece = Piece()
        self._parts, held, name = TextStateMachine.flush(self._parts)
        self._add(name, held, piece)
        if self._call:
            piece.calls.append(self._call)
            self._call = ""
        return piece

    def _split(self, text: str, piece: Piece) -> None:
        self._parts, segments = TextStateMachine.split(self._parts, text)
        for name, part in segments:
            self._add(name, part, piece)

    def _add(self, name: str, text: str, piece: Piece) -> None:
        if name == _TOOL:
            self._call += text
        elif name == _REASONING:
            piece.reasoning += text
        elif name == _NORMAL:
            if self._call:
                piece.calls.append(self._call)
                self._call = ""
            piece.content += text
