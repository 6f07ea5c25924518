"""From tokens to the parts of an answer: text, thoughts and calls of tools."""

from dataclasses import dataclass, field
from typing import Any

from ...models.compat.generate import TextStateMachine, make_text_state_machine
from ..served_models import ServedModel
from .logprobs import TokenLogprobs


@dataclass
class Token:
    """What a token adds to an answer. Any part may be empty."""

    content: str = ""
    reasoning: str = ""  # a thought before it
    calls: list[Any] = field(default_factory=list)  # complete ones, as a model writes them
    finish_reason: str | None = None  # "stop" or "length" if the answer ends with it
    logprobs: TokenLogprobs | None = None  # if the request asks for it; None for the end token

    def add(self, other: "Token") -> None:
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.finish_reason = other.finish_reason


class AnswerText:
    """The text of one answer, given out as soon as its part is certain.

    It ends before a ``stop`` text, and begins in a ``state`` of mlx-lm's names. mlx-lm's
    detokenizers drop a space at its beginning, unless it is told to ``keep_space``.
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
        machine = TextStateMachine({"normal": [(word, None) for word in stop]} if stop else None)
        self._until_stop = machine.make_state()
        self._parts = make_text_state_machine(served.tokenizer).make_state(state)
        self._certain, self._call = Token(), ""  # not given out yet

    def add(self, token: int) -> Token:
        """Adds a token. Returns what is certain now, which a stop text may end."""
        self._detokenizer.add_token(token)
        return self._take(ends=False)

    def finish(self) -> Token:
        """Ends the answer. Returns what was held back, up to a stop text in it."""
        self._detokenizer.finalize()
        return self._take(ends=True)

    def _take(self, *, ends: bool) -> Token:
        text = self._detokenizer.last_segment
        self._until_stop, segments = TextStateMachine.split(self._until_stop, text)
        self._split(segments[0][1])
        stopped = self._until_stop[0] is None
        if ends and not stopped:
            self._until_stop, held, _ = TextStateMachine.flush(self._until_stop)
            self._split(held)
        if ends or stopped:  # what was held back as a possible beginning of a marker is none
            self._parts, held, name = TextStateMachine.flush(self._parts)
            self._add(name, held)
            self._end_call()
        certain, self._certain = self._certain, Token()
        certain.finish_reason = "stop" if stopped else None
        return certain

    def _split(self, text: str) -> None:
        self._parts, segments = TextStateMachine.split(self._parts, text)
        for name, part in segments:
            self._add(name, part)

    def _add(self, name: str, text: str) -> None:
        if name == "tool":
            self._call += text
        elif name == "reasoning":
            self._certain.reasoning += text
        elif name == "normal":
            self._end_call()
            self._certain.content += text

    def _end_call(self) -> None:
        if self._call:
            self._certain.calls.append(self._call)
            self._call = ""
