"""From a request to its jobs: prompts as tokens, and for each answer its progress and its text."""

import secrets
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

from ..lossless.sampler import make_sampler
from ..models.compat.mlx_lm import make_logits_processors
from ..models.libraries import apply_template
from ..structured.processor import GrammarProcessor
from .api_error import ApiError, loads
from .completions import AnswerText, Token, token_logprobs
from .requests import Request, read_request
from .served_models import ServedModel

TOKENIZE_SECONDS = 5.0
PART = 4096  # characters that are tokenized at once to see whether a text is too long
MAX_TOKENS_PER_CUT = 16  # that a text has in addition if it is tokenized in two parts
SECONDS_PER_MASK = 0.005  # of an answer in a form: all others wait for its mask
_THOUGHT_TAIL = 11  # tokens at a prompt's end in which a thought's beginning is searched


@dataclass(frozen=True)
class Prompt:
    """A prompt of at least one token."""

    tokens: list[int]
    # lengths at which its cache is stored, since other prompts begin in the same way
    landmarks: tuple[int, ...] = ()
    state: str = "normal"  # of the text at the answer's beginning, or "reasoning"
    keep_space: bool = False  # whether a space at the answer's beginning is part of it


LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Progress:
    """The prompt has been read as far as ``done`` of its ``total`` tokens."""

    done: int
    total: int


# The last is a failure: within the server, or an ApiError of the request.
Event = Progress | Token | BaseException


@dataclass(eq=False)
class Job:
    """A sequence to be generated."""

    request: Request
    prompt: Prompt
    # takes (index, event) by put, from the engine's thread; it must not raise
    events: Any = field(default_factory=SimpleQueue)
    index: int = 0  # of this answer within its request
    # keeps the answer in a form, and allows the end token alone when that is complete
    grammar: GrammarProcessor | None = None
    cached: int = 0  # tokens of the prompt that a cache held
    cancelled: bool = False  # nobody wants the answer any more
    ended: bool = False  # its last event has been emitted
    alone: bool = False  # goes on by itself, after a failure of a step that it shared
    error: BaseException | None = None  # of one of its processors

    def __post_init__(self):
        request, self.served = self.request, self.request.served
        self.max_tokens = min(request.max_tokens, self.served.context - len(self.prompt.tokens))
        # OpenAI's seeds may be negative. Without one, MLX's random state decides nothing, which a
        # function that fails while MLX compiles it leaves unusable.
        seed = secrets.randbits(64) if request.seed is None else request.seed % 2**64 + self.index
        self.sampler = make_sampler(**request.sampling, seed=seed)
        # Each is called once for every token, with all tokens so far, and may hold a state. Arrays
        # that it holds must be evaluated already: it is called in another thread.
        self.processors: list[LogitsProcessor] = make_logits_processors(**request.penalties)
        self.processors += [] if self.grammar is None else [self.grammar]
        self.tokens: list[int] = []  # that were generated, with the end token
        self.times: list[float] = []  # of the first and the last of them, by time.monotonic
        tokenizer, begins = self.served.tokenizer, (self.prompt.state, self.prompt.keep_space)
        self._text = AnswerText(tokenizer, request.stop_machine, *begins)

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt.tokens + self.tokens

    @property
    def wanted(self) -> bool:
        return not (self.cancelled or self.ended)

    def emit(self, event: Event) -> None:
        self.events.put((self.index, event))

    def take(self, token: int, logprobs: mx.array) -> bool:
        """Reports a generated token. Returns whether the answer is complete.

        An error of one of its processors is raised, and an ApiError if its form cannot be followed.
        """
        if self.error is not None:
            raise RuntimeError(f"A logits processor has failed: {self.error}") from self.error
        self.tokens.append(token)
        self.times[1:] = [time.monotonic()]
        if token in self.served.tokenizer.eos_token_ids:
            if self.grammar and (problem := self.grammar.problem):
                why = f"The form cannot be followed any further ({problem}): simplify it."
                raise ApiError(why, "response_format")
            event = self._text.finish()
            event.finish_reason = "stop"
        else:
            event = self._text.add(token)
            if event.finish_reason is None and len(self.tokens) >= self.max_tokens:
                event.add(self._text.finish())
                event.finish_reason = event.finish_reason or "length"
            if self.request.logprobs is not None:
                event.logprobs = token_logprobs(logprobs, token, self.request.logprobs)
        self.ended = event.finish_reason is not None
        self.emit(event)
        return self.ended


def read_jobs(
    body: bytes, *, chat: bool, models: Sequence[ServedModel], flags: Namespace
) -> list[Job]:
    """A job for each answer to a request.

    Templates and grammars have limits of time and memory, and whatever else takes time grows with
    the body alone. An ApiError names the field that is wrong.
    """
    try:
        fields = loads(body)
    except ValueError as error:
        raise ApiError(f"The body is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError("The body must be a JSON object.")
    request = read_request(fields, chat=chat, models=models, defaults=flags)
    prompts = read_prompts(request)
    grammar = None
    if request.form is not None:
        tokenizer, limit = request.served.tokenizer, {"seconds_per_mask": SECONDS_PER_MASK}
        # an answer has its form once the thought is at its end that the prompt begins
        after = tokenizer.think_end_tokens if prompts[0].state == "reasoning" else ()
        try:
            grammar = GrammarProcessor(tokenizer, request.form, after=after, **limit)
        except ValueError as error:
            raise ApiError(str(error), "response_format") from None
    return [
        Job(request, prompt, index=index, grammar=grammar and grammar.for_sequence())
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(request.n))
    ]


def read_prompts(request: Request) -> list[Prompt]:
    """The prompts of a request: one of a chat, one for each text."""
    if request.chat:
        return [_chat_prompt(request)]
    texts = [_tokens(request.served, prompt, "prompt") for prompt in request.prompts]
    return [Prompt(tokens, keep_space=True) for tokens in texts]


def _chat_prompt(request: Request) -> Prompt:
    served = request.served
    text = _render(request, request.messages)
    tokens = _tokens(served, text, "messages", add_special_tokens=False)
    landmarks: tuple[int, ...] = ()
    if not served.cuttable:
        landmarks = (*_end_of_system(request, tokens), _start_of_thought(served, tokens))
    return Prompt(tokens, landmarks, _state(served, tokens), keep_space=request.form is not None)


def _render(request: Request, messages: list[dict[str, Any]], *, answer: bool = True) -> str:
    tokenizer = request.served.tokenizer
    if not tokenizer.has_chat_template:
        remedy = "use /v1/completions, or start the server with --chat-template"
        raise ApiError(f"This model has no chat template: {remedy}.", "messages")
    settings = request.served.template_arguments | request.template_settings
    settings |= {"tools": request.tools or None, "add_generation_prompt": answer}
    remedy = "send fewer or other messages"
    try:
        return apply_template(tokenizer, messages, remedy=remedy, **settings)
    except ValueError as error:
        raise ApiError(str(error), "messages") from error


def _tokens(served: ServedModel, prompt: str | list[int], field: str, **options: Any) -> list[int]:
    """The tokens of a prompt that the context has room for."""
    length = f"more than {served.context:,}"
    if isinstance(prompt, str) and not _is_too_long(served, prompt, field):
        prompt = served.tokenizer.encode(prompt, **options)
    if not isinstance(prompt, str):
        if not prompt:
            raise ApiError("The prompt is empty: it needs at least one token.", field)
        if len(prompt) < served.context:
            return prompt
        length = f"{len(prompt):,}"
    most = f"at most {served.context - 1:,} are read"
    reason = f"since the answer needs one of the context's {served.context:,}"
    refusal = f"The prompt has {length} tokens, and {most}, {reason}: send less."
    raise ApiError(refusal, field, code="context_length_exceeded")


def _is_too_long(served: ServedModel, text: str, field: str) -> bool:
    """Whether a text has more tokens than the context, counted in parts up to that many."""
    if len(text.encode()) < served.context:
        return False
    n_tokens, ends = 0, time.monotonic() + TOKENIZE_SECONDS
    for n_cuts, start in enumerate(range(0, len(text), PART)):
        part = text[start : start + PART]
        n_tokens += len(served.tokenizer.encode(part, add_special_tokens=False))
        if n_tokens - n_cuts * MAX_TOKENS_PER_CUT > served.context:
            return True
        if time.monotonic() > ends:
            limit = f"within {TOKENIZE_SECONDS:g} seconds"
            raise ApiError(f"The prompt could not be made tokens {limit}: send less.", field)
    return False


def _end_of_system(request: Request, tokens: list[int]) -> list[int]:
    """How many tokens the prompt shares with others of the same system messages."""
    system = [*takewhile(lambda message: message["role"] == "system", request.messages)]
    if len(system) in (0, len(request.messages)):
        return []
    other = [*system, {"role": "user", "content": ""}]
    try:
        text = _render(request, other, answer=False)
    except ApiError:
        return []  # an answer does not need landmarks
    shared = request.served.tokenizer.encode(text, add_special_tokens=False)
    differ = (i for i, (a, b) in enumerate(zip(shared, tokens, strict=False)) if a != b)
    return [next(differ, 0)]


def _start_of_thought(served: ServedModel, tokens: list[int]) -> int:
    """The prompt's length before the thought that its end begins. The next prompt lacks it."""
    tokenizer = served.tokenizer
    if tokenizer.has_thinking:
        start = tokenizer.rfind_think_start(tokens, start=len(tokens) - _THOUGHT_TAIL)
        if start >= 0:
            return start
    return len(tokens) - 1


def _state(served: ServedModel, tokens: list[int]) -> str:
    tokenizer = served.tokenizer
    if tokenizer.response_initial_state:
        return tokenizer.response_initial_state
    if not tokenizer.has_thinking:
        return "normal"
    thinks = tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
    return "reasoning" if thinks else "normal"
