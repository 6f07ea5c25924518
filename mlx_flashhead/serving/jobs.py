"""Jobs: the answers that a request asks for, each with its sampler, its form and its text."""

import secrets
import time
from argparse import Namespace
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

from ..common.masks import Mask
from ..decoding.sampling import make_sampler
from ..models.compat.mlx_lm import make_logits_processors
from ..structured.processor import GrammarProcessor
from .answer_text import AnswerText, PromptProgress, Token, token_logprobs
from .api_errors import ApiError
from .prompts import Prompt, read_prompts
from .requests import Request
from .served_models import ServedModel

# All other answers wait for the mask of one in a form.
SECONDS_PER_MASK = 0.005


@dataclass(eq=False)
class Job:
    """An answer to be generated.

    Attributes:
        request: The request.
        prompt: One of the request's prompts.
        events: Takes (index, event) by ``put``, from the engine's thread. An event is a
            PromptProgress, a Token or an error.
        index: The number of this answer within its request.
        address: The client's.
        cached: The number of the prompt's tokens that a cache held.
        n_guessed: The number of the answer's tokens that were guessed.
        ended: Whether its last event has been emitted, or its client has left.
        alone: Whether it goes on by itself, after a failure of a step that it shared.
        tokens: The tokens that were generated, with the end token.
        times: Those of the first and the last of them, by ``time.monotonic``.
    """

    request: Request
    prompt: Prompt
    events: Any = field(default_factory=SimpleQueue)
    index: int = 0
    address: str = ""
    cached: int = 0
    n_guessed: int = 0
    ended: bool = False
    alone: bool = False

    def __post_init__(self):
        request = self.request
        self.served: ServedModel = request.served
        fields = request.fields
        self.max_tokens: int = self.served.context - len(self.prompt.tokens)
        if fields.max_tokens is not None:
            self.max_tokens = min(fields.max_tokens, self.max_tokens)
        self.settings = replace(self.served.settings, n_probes=fields.n_probes, dense=fields.dense)
        tokenizer = self.served.tokenizer
        self.sampler = make_sampler(
            fields.temperature,
            top_p=fields.top_p,
            min_p=fields.min_p,
            top_k=fields.top_k,
            xtc_probability=fields.xtc_probability,
            xtc_threshold=fields.xtc_threshold,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
            seed=self._seed(),
        )
        self.processors: list[Any] = make_logits_processors(
            fields.logit_bias or None,
            repetition_penalty=fields.repetition_penalty,
            repetition_context_size=fields.repetition_context_size,
            presence_penalty=fields.presence_penalty,
            presence_context_size=fields.presence_context_size,
            frequency_penalty=fields.frequency_penalty,
            frequency_context_size=fields.frequency_context_size,
        )
        self.grammar: GrammarProcessor | None = None
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._text = AnswerText(tokenizer, request.stop, self.prompt.state, self.prompt.keep_space)

    def _seed(self) -> int:
        """The seed of this answer.

        MLX's random state decides nothing: it is left unusable by a function that fails while MLX
        compiles it.
        """
        seed = self.request.fields.seed
        if seed is None:
            return secrets.randbits(64)
        # OpenAI's seeds may be negative.
        return seed % 2**64 + self.index

    def follow(self, grammar: GrammarProcessor) -> None:
        """Keeps the answer in a form."""
        self.grammar = grammar
        # The grammar's `begin` is left out, since a text may go on after a failure.
        self.processors.append(Mask(grammar.allowed, grammar.forced_tokens))

    @property
    def batch_key(self) -> tuple:
        """What jobs of one batch have in common.

        A batch pads its caches to the longest one, so a long text would multiply the memory and the
        time of short questions.
        """
        # 0 up to 1,024 tokens, 1 up to 4,096, 2 up to 16,384 and so on.
        length_class = max(0, (len(self.prompt.tokens) - 1).bit_length() - 9) // 2
        return self.served, self.settings, length_class

    @property
    def all_tokens(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return self.prompt.tokens + self.tokens

    def emit(self, event: PromptProgress | Token | BaseException) -> None:
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
        if ends and self.grammar is not None and self.grammar.problem is not None:
            raise ApiError(
                f"The form cannot be followed any further ({self.grammar.problem}): simplify it.",
                _field_of_form(self.request),
            )
        if ends:
            event = self._text.add(None, last=True)
            event.finish_reason = "stop"
        else:
            is_last = len(self.tokens) >= self.max_tokens
            event = self._text.add(token, last=is_last)
            if is_last and event.finish_reason is None:
                event.finish_reason = "length"
            if self.request.logprobs is not None:
                event.logprobs.append(token_logprobs(logprobs, token, self.request.logprobs))
        complete = event.finish_reason is not None
        self.ended |= complete
        self.emit(event)
        return complete


def read_jobs(
    fields: dict[str, Any],
    *,
    chat: bool,
    models: list[ServedModel],
    flags: Namespace,
    events: Any = None,
    address: str = "",
    any_model: bool = False,
) -> list[Job]:
    """Makes a job for each answer to a request.

    Templates and grammars have limits of time and memory, and all else takes time with the number
    of fields alone.

    Args:
        fields: Those of the request.
        chat: Whether they are those of a chat; else texts are continued.
        models: The models that are served.
        flags: The server's options.
        events: What takes the jobs' events; None: a queue for each.
        address: That of the client.
        any_model: Whether a name that is not served stands for the only model.

    Raises:
        ApiError: If a field is wrong; it names the field.
    """
    request = Request(fields, chat=chat, models=models, flags=flags, any_model=any_model)
    prompts = read_prompts(request)
    grammar = _processor(request, prompts[0].state)
    jobs: list[Job] = []
    for prompt in prompts:
        for _ in range(request.fields.n):
            job = Job(request, prompt, index=len(jobs), address=address)
            if events is not None:
                job.events = events
            if grammar is not None:
                job.follow(grammar.for_text())
            jobs.append(job)
    return jobs


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
    grammar = request.grammar
    if tools.required:
        grammar = None
    try:
        return GrammarProcessor(
            tokenizer,
            grammar,
            calls=tools.calls,
            required=tools.required,
            thought=_thought_marks(request, state),
            seconds_per_mask=SECONDS_PER_MASK,
        )
    except ValueError as error:
        raise ApiError(str(error), _field_of_form(request)) from None


def _thought_marks(request: Request, state: str) -> tuple[str, str] | None:
    """The marks of the thought after which an answer has its form; None if there is no thought.

    The first mark is empty if the prompt begins the thought.
    """
    tokenizer = request.served.tokenizer
    if not tokenizer.has_thinking:
        return None
    if state == "reasoning":
        return "", tokenizer.think_end
    if request.tools.calls is not None:
        return tokenizer.think_start, tokenizer.think_end
    return None


def _field_of_form(request: Request) -> str:
    """The field that an answer's form comes from."""
    if request.grammar is None:
        return "tools"
    return "response_format"
