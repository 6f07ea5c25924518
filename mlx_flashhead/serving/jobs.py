"""From a request to its jobs: prompts as tokens, and for each answer its progress and its text."""

import math
import secrets
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from queue import SimpleQueue
from typing import Any, NamedTuple

import mlx.core as mx

from ..common.marks import masks
from ..decoding.sampler import make_sampler
from ..models.compat.mlx_lm import (
    TextStateMachine,
    make_logits_processors,
    make_text_state_machine,
)
from ..models.templates import apply_template
from ..structured.processor import GrammarProcessor
from .api_errors import ApiError
from .control_tokens import mark_control_tokens
from .requests import Request
from .served_models import ServedModel

PART = 4096  # characters that are tokenized at once to see whether a text is too long
MAX_TOKENS_PER_CUT = 16  # that a text has in addition if it is tokenized in two parts
SECONDS_PER_MASK = 0.005  # of an answer in a form: all others wait for its mask
VERY_UNLIKELY = -9999.0  # OpenAI's value for a token that is too unlikely to have a logprob

# (id, log-probability) of a chosen token, and then of the likeliest tokens at its place, in order.
TokenLogprobs = list[tuple[int, float]]


@dataclass(frozen=True)
class Prompt:
    """A prompt of at least one token."""

    tokens: list[int]
    # lengths at which its cache is stored, since other prompts begin in the same way
    landmarks: tuple[int, ...] = ()
    state: str = "normal"  # of the text at the answer's beginning, or "reasoning"
    keep_space: bool = False  # whether a space at the answer's beginning is part of it


class Progress(NamedTuple):
    """The prompt has been read as far as ``done`` of its ``total`` tokens."""

    done: int
    total: int


@dataclass
class Token:
    """What a token adds to an answer. Any part may be empty."""

    content: str = ""
    reasoning: str = ""  # a thought before it
    calls: list[Any] = field(default_factory=list)  # complete ones, as a model writes them
    finish_reason: str | None = None  # "stop" or "length" if the answer ends with it
    logprobs: TokenLogprobs | None = None  # if the request wants it; None for the end token

    def add(self, other: "Token") -> None:
        """Adds the content of a later token, whose finish reason counts."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.finish_reason = other.finish_reason


class AnswerText:
    """The text of one answer, which is emitted as soon as a part is certain.

    It ends before a text of ``stop``, and begins in a ``state`` of mlx-lm's names.
    """

    def __init__(self, tokenizer: Any, stop: TextStateMachine, state: str, keep_space=False):
        self._detokenizer = tokenizer.detokenizer
        if keep_space:  # detokenizers drop one at the beginning, not after another word
            for token in tokenizer.encode("a", add_special_tokens=False):
                self._detokenizer.add_token(token)
            _ = self._detokenizer.last_segment
        self._until_stop = stop.make_state()
        self._parts = make_text_state_machine(tokenizer).make_state(state)
        self._call = ""  # that is being written

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
        self._until_stop, ((_, text), *_) = TextStateMachine.split(self._until_stop, text)
        stopped = self._until_stop[0] is None
        if last and not stopped:
            self._until_stop, held, _ = TextStateMachine.flush(self._until_stop)
            text += held
        self._parts, parts = TextStateMachine.split(self._parts, text)
        if last or stopped:  # what may have begun a marker is none, and a call ends
            self._parts, held, name = TextStateMachine.flush(self._parts)
            parts.append((name, held))
            is_cut = stopped or token is not None
            parts.append(("cut" if is_cut and name == "tool" else "normal", ""))
        certain = Token(finish_reason="stop" if stopped else None)
        self._sort(parts, certain)
        return certain

    def _sort(self, parts: list[tuple[str, str]], certain: Token) -> None:
        """Adds parts of the text by their kinds to what is certain; a call is added when whole."""
        for name, part in parts:
            if name == "tool":
                self._call += part
            elif name == "reasoning":
                certain.reasoning += part
            elif name == "cut":  # what there is of a call is none
                certain.content += self._call
                self._call = ""
            elif name == "normal":
                certain.calls += [self._call] if self._call else []
                self._call = ""
                certain.content += part


@dataclass(eq=False)
class Job:
    """A sequence to be generated."""

    request: Request
    prompt: Prompt
    # takes (index, event) by put, from the engine's thread: a Progress, a Token, or an error
    events: Any = field(default_factory=SimpleQueue)
    index: int = 0  # of this answer within its request
    grammar: GrammarProcessor | None = None  # keeps the answer in a form
    cached: int = 0  # tokens of the prompt that a cache held
    ended: bool = False  # its last event has been emitted, or its client has left
    alone: bool = False  # goes on by itself, after a failure of a step that it shared

    def __post_init__(self):
        request = self.request
        self.served = self.request.served
        n_free = self.served.context - len(self.prompt.tokens)
        self.max_tokens = n_free if request.max_tokens is None else min(request.max_tokens, n_free)
        # OpenAI's seeds may be negative. MLX's random state decides nothing: it is left unusable by
        # a function that fails while MLX compiles it.
        seed = secrets.randbits(64) if request.seed is None else request.seed % 2**64 + self.index
        self.sampler = make_sampler(**request.sampling, seed=seed)
        self.processors: list[Any] = make_logits_processors(**request.penalties)
        if self.grammar is not None:  # without its `begin`: a text may go on after a failure
            self.processors.append(masks(partial(self.grammar), self.grammar.allowed_words))
        self.tokens: list[int] = []  # that were generated, with the end token
        self.times: list[float] = []  # of the first and the last of them, by time.monotonic
        tokenizer = self.served.tokenizer
        begins = (self.prompt.state, self.prompt.keep_space)
        self._text = AnswerText(tokenizer, request.stop, *begins)

    @property
    def kind(self) -> tuple:
        """What jobs of one batch have in common.

        A batch pads its caches to the longest one, so a long text would multiply the memory and the
        time of short questions.
        """
        # 0 up to 1,024 tokens, 1 up to 4,096, 2 up to 16,384 and so on
        length_class = max(0, (len(self.prompt.tokens) - 1).bit_length() - 9) // 2
        return self.served, self.request.n_probes, self.request.dense, length_class

    @property
    def all_tokens(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return self.prompt.tokens + self.tokens

    def emit(self, event: Progress | Token | BaseException) -> None:
        """Puts an event of this job in its queue."""
        self.events.put((self.index, event))

    def take(self, token: int, logprobs: mx.array) -> bool:
        """Reports a generated token, and returns whether the answer is complete.

        Raises:
            ApiError: If its form cannot be followed.
        """
        self.tokens.append(token)
        self.times[1:] = [time.monotonic()]
        ends = token in self.served.tokenizer.eos_token_ids
        if ends and self.grammar and (problem := self.grammar.problem):
            why = f"The form cannot be followed any further ({problem}): simplify it."
            raise ApiError(why, _field_of_form(self.request))
        last = ends or len(self.tokens) >= self.max_tokens
        event = self._text.add(None if ends else token, last=last)
        if last:
            event.finish_reason = "stop" if ends else event.finish_reason or "length"
        if self.request.logprobs is not None and not ends:
            event.logprobs = token_logprobs(logprobs, token, self.request.logprobs)
        complete = event.finish_reason is not None
        self.ended |= complete
        self.emit(event)
        return complete


def token_logprobs(logprobs: mx.array, token: int, n_tops: int) -> TokenLogprobs:
    """Returns the log-probabilities of a chosen token and of the likeliest ones.

    Args:
        logprobs: Those of all tokens (V,).
        token: The chosen token.
        n_tops: The number of the likeliest tokens.
    """
    n_tops = min(n_tops, logprobs.size)
    likeliest: Any = mx.argpartition(-logprobs, kth=n_tops - 1)[:n_tops].tolist() if n_tops else []
    ids = [token, *likeliest]
    values: Any = logprobs[mx.array(ids)].tolist()
    values = [value if math.isfinite(value) else VERY_UNLIKELY for value in values]
    chosen, *tops = zip(ids, values, strict=True)
    return [chosen, *sorted(tops, key=lambda top: -top[1])]


def read_jobs(
    fields: dict[str, Any], *, chat: bool, models: list[ServedModel], flags: Namespace
) -> list[Job]:
    """Makes a job for each answer to a request.

    Templates and grammars have limits of time and memory, and all else takes time with the number
    of fields alone.

    Args:
        fields: Those of the request.
        chat: Whether they are those of a chat; else texts are continued.
        models: The models that are served.
        flags: The server's options.

    Raises:
        ApiError: If a field is wrong; it names the field.
    """
    request = Request(fields, chat=chat, models=models, flags=flags)
    prompts = read_prompts(request)
    grammar = _processor(request, prompts[0].state)
    return [
        Job(request, prompt, index=index, grammar=grammar and grammar.for_sequence())
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(request.n))
    ]


def _processor(request: Request, state: str) -> GrammarProcessor | None:
    """What keeps an answer in its form, and its calls in theirs; None if it is free.

    Args:
        request: A checked request.
        state: That of the text at the answer's beginning, in mlx-lm's words.
    """
    tools = request.tools
    if request.grammar is None and tools.calls is None:
        return None
    tokenizer = request.served.tokenizer
    # an answer has its form once the thought is at its end that the prompt begins
    after = tokenizer.think_end_tokens if state == "reasoning" else ()
    thought = None
    if tools.calls is not None and tokenizer.has_thinking:
        thought = (tokenizer.think_start, tokenizer.think_end)
    try:
        return GrammarProcessor(
            tokenizer,
            None if tools.required else request.grammar,
            calls=tools.calls,
            required=tools.required,
            after=after,
            thought=thought,
            seconds_per_mask=SECONDS_PER_MASK,
        )
    except ValueError as error:
        raise ApiError(str(error), _field_of_form(request)) from None


def _field_of_form(request: Request) -> str:
    """The field that an answer's form comes from."""
    return "tools" if request.grammar is None else "response_format"


def read_prompts(request: Request) -> list[Prompt]:
    """The prompts of a request: one of a chat, one for each text."""
    served = request.served
    tokenizer = request.served.tokenizer
    if not request.chat:
        texts = [_tokens(served, prompt, "prompt") for prompt in request.prompts]
        return [Prompt(tokens, keep_space=True) for tokens in texts]
    text = _render(request, request.messages)
    tokens = _tokens(served, text, "messages", add_special_tokens=False)
    if request.escape_control_tokens:
        tokens = _escaped_tokens(request)
    initial = getattr(tokenizer, "response_initial_state", None)  # 0.31 has no formats of answers
    state = initial or "normal"
    if tokenizer.has_thinking and not initial:
        begun = tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
        state = "reasoning" if begun else state
    landmarks: list[int] = []
    if not served.cuttable:  # the next prompt may lack this one's last tokens, as for a thought
        landmarks = [*_end_of_system(request, tokens), max(1, len(tokens) - 11)]
    return [Prompt(tokens, tuple(landmarks), state, keep_space=request.grammar is not None)]


def _escaped_tokens(request: Request) -> list[int]:
    """The tokens of a chat's prompt, without control tokens from users and tools."""
    served = request.served
    messages, mark = mark_control_tokens(request.messages, served.control_tokens)
    tokens: list[int] = []
    for piece in _render(request, messages).split(mark):
        tokens += served.tokenizer.encode(piece, add_special_tokens=False)
    return _tokens(served, tokens, "messages")


def _render(request: Request, messages: list[dict[str, Any]], *, answer: bool = True) -> str:
    tokenizer = request.served.tokenizer
    if not tokenizer.has_chat_template:
        remedy = "use /v1/completions, or start the server with --chat-template"
        raise ApiError(f"This model has no chat template: {remedy}.", "messages")
    settings = request.served.template_arguments | request.template_settings
    settings |= {"tools": request.tools.offered or None, "add_generation_prompt": answer}
    try:
        remedy = "send fewer or other messages"
        return apply_template(tokenizer, messages, remedy=remedy, **settings)
    except ValueError as error:
        raise ApiError(str(error), "messages") from error


def _tokens(served: ServedModel, prompt: str | list[int], field: str, **options: Any) -> list[int]:
    """The tokens of a prompt that the context has room for."""
    encode = served.tokenizer.encode
    context = served.context
    tokens: Any = prompt
    n_least = 0  # tokens, as far as they have been counted
    if isinstance(prompt, str):
        # a tokenizer cannot be interrupted, so a long text is counted in parts first
        parts = range(0, len(prompt), PART) if len(prompt.encode()) >= context else ()
        for start in parts:
            n_least += len(encode(prompt[start : start + PART], add_special_tokens=False))
            n_least -= MAX_TOKENS_PER_CUT if start else 0
            if n_least > context:
                break
        else:
            tokens = encode(prompt, **options)
    if not tokens:
        raise ApiError("The prompt is empty: it needs at least one token.", field)
    if n_least > context or len(tokens) >= context:
        refusal = f"The prompt is longer than this model's {context:,}-token context: shorten it."
        raise ApiError(refusal, field, code="context_length_exceeded")
    return tokens


def _end_of_system(request: Request, tokens: list[int]) -> list[int]:
    """How many tokens the prompt shares with others of the same system messages."""
    system = [*takewhile(lambda message: message["role"] == "system", request.messages)]
    if len(system) in (0, len(request.messages)):
        return []
    with suppress(ApiError):  # an answer does not need landmarks
        text = _render(request, [*system, {"role": "user", "content": ""}], answer=False)
        shared = request.served.tokenizer.encode(text, add_special_tokens=False)
        differ = (i for i, (a, b) in enumerate(zip(shared, tokens, strict=False)) if a != b)
        return [next(differ, 0)]
    return []
