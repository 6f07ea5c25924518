"""What the tokens of an answer add to it: text, thoughts, calls and log-probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..models.compat.mlx_lm import TextStateMachine, make_text_state_machine

# The name of the state after a stop text begins with this.
STOP = "stop at "
# OpenAI's value for a token that is too unlikely to have a logprob.
VERY_UNLIKELY = -9999.0

# (id, log-probability) of a chosen token, and then of the likeliest tokens at its place, in order.
TokenLogprobs = list[tuple[int, float]]


class PromptProgress(NamedTuple):
    """The prompt has been read as far as ``done`` of its ``total`` tokens."""

    done: int
    total: int


@dataclass
class Token:
    """What a token adds to an answer. Any part may be empty.

    Attributes:
        content: Text of the answer.
        reasoning: Text of a thought before it.
        calls: Complete calls, as a model writes them.
        finish_reason: "stop" or "length" if the answer ends with the token.
        stop_text: The text before which the answer ends.
        logprobs: Those of the token, if the request wants them. The end token has none.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_text: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, other: "Token") -> None:
        """Adds the content of a later token, whose finish reason counts."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.stop_text = other.stop_text


def stop_machine(stops: Sequence[str]) -> TextStateMachine:
    """The machine that finds the first of some texts, and is in a state of its name then."""
    transitions: dict[str, list[tuple[str, str]]] = {"normal": []}
    for stop in stops:
        transitions["normal"].append((stop, STOP + stop))
        transitions[STOP + stop] = []
    return TextStateMachine(transitions)


class AnswerText:
    """The text of one answer, which is emitted as soon as a part is certain.

    It ends before a text of ``stop``, a :func:`stop_machine`. It begins in a ``state`` of mlx-lm's
    names.
    """

    def __init__(self, tokenizer: Any, stop: TextStateMachine, state: str, keep_space=False):
        self._detokenizer = tokenizer.detokenizer
        if keep_space:
            # Detokenizers drop a space at the beginning, not after another word.
            for token in tokenizer.encode("a", add_special_tokens=False):
                self._detokenizer.add_token(token)
            _ = self._detokenizer.last_segment
        self._until_stop = stop.make_state()
        self._parts = make_text_state_machine(tokenizer).make_state(state)
        # What there is of the call that is being written.
        self._call = ""

    def add(self, token: int | None, *, last: bool = False) -> Token:
        """Adds a token, if there is one, and may end the answer.

        Returns:
            What is certain now, which a stop text may end.
        """
        if token is not None:
            self._detokenizer.add_token(token)
        if last:
            self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        self._until_stop, (before_stop, *_) = TextStateMachine.split(self._until_stop, text)
        _, text = before_stop
        certain = Token()
        state_name = self._until_stop[0]
        stopped = state_name.startswith(STOP)
        if stopped:
            certain.finish_reason = "stop"
            certain.stop_text = state_name.removeprefix(STOP)
        elif last:
            self._until_stop, held, _ = TextStateMachine.flush(self._until_stop)
            text += held
        self._parts, parts = TextStateMachine.split(self._parts, text)
        if last or stopped:
            # What may have begun a marker is none, and a call ends.
            self._parts, held, name = TextStateMachine.flush(self._parts)
            parts.append((name, held))
            is_cut = stopped or token is not None
            if is_cut and name == "tool":
                parts.append(("cut", ""))
            else:
                parts.append(("normal", ""))
        self._sort(parts, certain)
        return certain

    def _sort(self, parts: list[tuple[str, str]], certain: Token) -> None:
        """Adds parts of the text by their kinds to what is certain; a call is added when whole."""
        for name, part in parts:
            if name == "tool":
                self._call += part
            elif name == "reasoning":
                certain.reasoning += part
            elif name == "cut":
                # What there is of the call is text after all.
                certain.content += self._call
                self._call = ""
            elif name == "normal":
                if self._call:
                    certain.calls.append(self._call)
                self._call = ""
                certain.content += part


def token_logprobs(logprobs: mx.array, token: int, n_tops: int) -> TokenLogprobs:
    """Returns the log-probabilities of a chosen token and of the likeliest ones.

    Args:
        logprobs: Those of all tokens (V,).
        token: The chosen token.
        n_tops: The number of the likeliest tokens.
    """
    n_tops = min(n_tops, logprobs.size)
    ids = [token]
    if n_tops:
        likeliest: Any = mx.argpartition(-logprobs, kth=n_tops - 1)[:n_tops].tolist()
        ids += likeliest
    values: Any = logprobs[mx.array(ids)].tolist()
    entries = []
    for each, value in zip(ids, values, strict=True):
        if not math.isfinite(value):
            value = VERY_UNLIKELY
        entries.append((each, value))
    tops = sorted(entries[1:], key=lambda entry: -entry[1])
    return [entries[0], *tops]
