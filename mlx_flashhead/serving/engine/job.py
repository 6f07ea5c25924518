"""One answer in progress: the job of the generating thread, and the events of its progress."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import mlx.core as mx

from ...lossless.sampler import make_sampler
from ...models.compat.sample_utils import make_logits_processors
from ...structured.processor import GrammarProcessor
from ..protocol.answer_text import AnswerText, Token
from ..protocol.api_error import ApiError
from ..protocol.logprobs import token_logprobs
from ..protocol.requests import Request
from .prompts import Prompt

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Progress:
    """The prompt has been read as far as ``done`` of its ``total`` tokens."""

    done: int
    total: int


# The last is a failure: within the server, or a ApiError of the request.
Event = Progress | Token | BaseException


@dataclass(eq=False)
class Job:
    """A sequence to be generated."""

    request: Request
    prompt: Prompt
    events: SimpleQueue  # each event comes with the index before it
    index: int = 0  # of this answer within its request
    # keeps the answer in a form, and allows the end token alone when that is complete
    grammar: GrammarProcessor | None = None
    cached: int = 0  # tokens of the prompt that were found in a cache
    cancelled: bool = False  # nobody wants the answer any more
    alone: bool = False  # goes on by itself, after a failure of a step that it shared
    error: BaseException | None = None  # of one of its processors

    def __post_init__(self):
        request, self.served = self.request, self.request.served
        self.max_tokens = min(request.max_tokens, self.served.context - len(self.prompt.tokens))
        # OpenAI's seeds may be negative
        seed = None if request.seed is None else request.seed % 2**64 + self.index
        self.sampler = make_sampler(**request.sampling, seed=seed)
        # Each is called once for every token, with all tokens so far, and may hold a state. Arrays
        # that it holds must be evaluated already: it is called in another thread.
        self.processors: list[LogitsProcessor] = make_logits_processors(**request.penalties)
        self.processors += [] if self.grammar is None else [self.grammar]
        self.tokens: list[int] = []  # that were generated, with the end token
        self.times: list[float] = []  # of the first and the last of them, by time.monotonic
        keep_space = self.prompt.keep_space
        self._text = AnswerText(self.served, request.stop, self.prompt.state, keep_space)

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt.tokens + self.tokens

    def tell(self, event: Event) -> None:
        self.events.put((self.index, event))

    def take(self, token: int, logprobs: mx.array) -> bool:
        """Reports a generated token. Returns whether the answer is complete.

        An error of one of its processors is raised, and a ApiError if its form cannot be followed.
        """
        if self.error is not None:
            raise RuntimeError(f"A logits processor has failed: {self.error}") from self.error
        self.tokens.append(token)
        self.times[1:] = [time.monotonic()]
        if token in self.served.tokenizer.eos_token_ids:
            if self.grammar and (problem := self.grammar.problem):
                why = f"The form cannot be followed any further ({problem}): simplify it."
                raise ApiError(why, "response_format")
            told = self._text.finish()
            told.finish_reason = "stop"
            self.tell(told)
            return True
        told = self._text.add(token)
        if told.finish_reason is None and len(self.tokens) >= self.max_tokens:
            told.add(self._text.finish())
            told.finish_reason = told.finish_reason or "length"
        if self.request.logprobs is not None:
            told.logprobs = token_logprobs(logprobs, token, self.request.logprobs)
        self.tell(told)
        return told.finish_reason is not None
