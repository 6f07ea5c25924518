"""One answer in progress: the job of the generating thread, and the events of its progress."""

import time
from dataclasses import dataclass, field
from queue import SimpleQueue

import mlx.core as mx

from ...structured.processor import GrammarProcessor
from ..catalogue import ServedModel
from ..protocol.answer_text import AnswerText, Piece
from ..protocol.errors import Problem
from ..protocol.logprobs import TokenLogprobs, token_logprobs
from ..protocol.sampling import LogitsProcessor, Sampler
from .prompts import Prompt


@dataclass(frozen=True)
class Progress:
    """A part of the prompt has been read.

    Attributes:
        done: Tokens that have been read.
        total: Tokens of the prompt.
    """

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """A token has been generated.

    Attributes:
        piece: Its addition to the answer.
        logprobs: Its log-probability, if the request asks for it; None for the end token.
        finish_reason: Reason if the answer ends with it: "stop" or "length"; else None.
    """

    piece: Piece
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True)
class Failure:
    """The answer has failed: within the server, or as a :class:`Problem` of the request."""

    error: BaseException


Event = Progress | Token | Failure


@dataclass(eq=False)
class Job:
    """A sequence to be generated.

    Attributes:
        served: The model.
        prompt: The prompt.
        max_tokens: Greatest number of tokens to generate.
        sampler: Draws a token.
        processors: Change the logits before that, exactly as with a dense head. Each is called once
            for every token, with all tokens so far, and may hold a state of this sequence. Arrays
            that it holds must be evaluated already: it is called in another thread.
        stop: Texts that end the answer.
        n_probes: Clusters scored per token; None: the head's own number.
        dense: Whether every token is scored.
        num_draft_tokens: Tokens drafted at once.
        logprobs: Number of likeliest tokens to report; None reports no logprobs.
        index: Number of this answer within its request.
        events: Queue of the events, each with the index before it.
        grammar: A last processor, which keeps the answer in a form and allows the end token alone
            when the form is complete; None for any text.
        cancelled: Set when nobody wants the answer any more. The generating thread then drops it.
        error: The failure of one of its processors.
        cached: Tokens of the prompt that were found in a cache.
        alone: Whether it goes on by itself, after a failure of a step that it shared.
        tokens: Generated tokens, with the end token.
        times: Times of the first and the last of them, in seconds of ``time.monotonic``.
    """

    served: ServedModel
    prompt: Prompt
    max_tokens: int
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: tuple[str, ...]
    n_probes: int | None
    dense: bool
    num_draft_tokens: int
    logprobs: int | None
    index: int
    events: SimpleQueue
    grammar: GrammarProcessor | None = None
    cancelled: bool = False
    error: BaseException | None = None
    cached: int = 0
    alone: bool = False
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _text: AnswerText = field(init=False)

    def __post_init__(self):
        if self.grammar is not None:
            self.processors = [*self.processors, self.grammar]
        self._text = AnswerText(self.served, self.stop, self.prompt.state, self.prompt.keep_space)

    @property
    def n_tokens(self) -> int:
        """Number of generated tokens, with the end token."""
        return len(self.tokens)

    @property
    def all_tokens(self) -> list[int]:
        """The prompt and the generated tokens."""
        return self.prompt.tokens + self.tokens

    def tell(self, event: Event) -> None:
        """Puts an event into the queue."""
        self.events.put((self.index, event))

    def take(self, token: int, logprobs: mx.array) -> bool:
        """Takes a generated token and reports it.

        Args:
            token: Its id.
            logprobs: (V,) log-probabilities at its place.

        Returns:
            Whether the answer is complete.

        Raises:
            Problem: If its form cannot be followed.
            RuntimeError: If one of its processors has failed.
        """
        if self.error is not None:
            raise RuntimeError(f"A logits processor has failed: {self.error}") from self.error
        self.tokens.append(token)
        self.times[1:] = [time.monotonic()]
        if token in self.served.tokenizer.eos_token_ids:
            if self.grammar and self.grammar.problem:
                raise Problem(
                    f"The form cannot be followed any further ({self.grammar.problem}): "
                    "simplify it.",
                    "response_format",
                )
            piece, _ = self._text.finish()
            self.tell(Token(piece, None, "stop"))
            return True
        piece, stopped = self._text.add(token)
        reason = "stop" if stopped else None
        if not stopped and self.n_tokens >= self.max_tokens:
            rest, stopped = self._text.finish()
            piece += rest
            reason = "stop" if stopped else "length"
        found = None
        if self.logprobs is not None:
            found = token_logprobs(logprobs, token, self.logprobs)
        self.tell(Token(piece, found, reason))
        return reason is not None
