"""One answer in the making: what the generating thread works on, and what it tells about it."""

import time
from dataclasses import dataclass, field
from queue import SimpleQueue

import mlx.core as mx

from .answer_text import AnswerText, Piece
from .logprobs import TokenLogprobs, token_logprobs
from .prompts import Prompt
from .sampling import LogitsProcessor, Sampler
from .served import ServedModel


@dataclass(frozen=True)
class Progress:
    """A part of the prompt has been read.

    Attributes:
        done: Tokens that need not be read any more.
        total: Tokens of the prompt.
    """

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """A token has been generated.

    Attributes:
        piece: What it adds to the answer.
        logprobs: Its log-probability, where that is asked for; None for the end token.
        finish_reason: Why the answer ends with it: "stop" or "length"; None if it goes on.
    """

    piece: Piece
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True)
class Failure:
    """The answer has failed, through no fault of the request."""

    error: Exception


Event = Progress | Token | Failure


@dataclass(eq=False)
class Job:
    """A sequence to be generated.

    Attributes:
        served: The model.
        prompt: What it continues.
        max_tokens: So many tokens are generated at most.
        sampler: Draws a token.
        processors: Change the logits before that. Each is called once for every token, with all
            tokens so far, and may hold a state of this sequence. Arrays that it holds must be
            evaluated already: it is called in another thread. One that leaves nothing but the end
            token, such as a grammar that is complete, ends the answer with "stop".
        stop: Texts that end the answer.
        n_probes: Clusters scored per token; None for a dense model.
        num_draft_tokens: Tokens drafted at once.
        logprobs: How many of the likeliest tokens are told; None tells no logprobs.
        index: Which of a request's answers this is.
        events: Where the events go, with the index before each.
        cancelled: Set by whoever does not want it any more; the generating thread then drops it.
        cached: Tokens of the prompt that were found in a cache.
        n_tokens: Tokens that have been generated, with the end token.
        times: Of the first of them and of the last, in the seconds of ``time.monotonic``.
    """

    served: ServedModel
    prompt: Prompt
    max_tokens: int
    sampler: Sampler
    processors: list[LogitsProcessor]
    stop: tuple[str, ...]
    n_probes: int | None
    num_draft_tokens: int
    logprobs: int | None
    index: int
    events: SimpleQueue
    cancelled: bool = False
    cached: int = 0
    n_tokens: int = 0
    times: list[float] = field(default_factory=list)
    _text: AnswerText = field(init=False)

    def __post_init__(self):
        self._text = AnswerText(self.served, self.stop, self.prompt.state)

    def tell(self, event: Event) -> None:
        """Hands an event to who waits for the answer."""
        self.events.put((self.index, event))

    def take(self, token: int, logprobs: mx.array) -> bool:
        """Takes a generated token, and tells of it.

        Args:
            token: Its id.
            logprobs: (V,) log-probabilities at its place.

        Returns:
            Whether the answer is complete.
        """
        self.n_tokens += 1
        self.times[1:] = [time.monotonic()]
        if token in self.served.tokenizer.eos_token_ids:
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
