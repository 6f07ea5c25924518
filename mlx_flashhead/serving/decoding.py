"""Answers as sequences: their prompts are read a chunk at a time, then their tokens are decoded.

Those of one model, one number of probes and similar lengths are a :class:`Batch`, which takes turns
with others. What no batch takes, as with a draft model or a quantized cache, is a :class:`Single`.
"""

import secrets
import time
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

from ..common.masks import Mask
from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.drafting import drafted_steps
from ..decoding.loop import verified_steps, with_guesses
from ..decoding.proposer import Proposer
from ..decoding.sampler import make_sampler
from ..models.compat.mlx_lm import (
    LRUPromptCache,
    can_trim_prompt_cache,
    make_logits_processors,
    make_prompt_cache,
    maybe_quantize_kv_cache,
)
from ..structured.processor import GrammarProcessor
from .answer_text import AnswerText, Progress, Token, token_logprobs
from .api_errors import ApiError
from .prompts import Prompt, read_prompts
from .requests import Request
from .served_models import ServedModel

SECONDS_PER_MASK = 0.005  # of an answer in a form: all others wait for its mask
# Seconds of a chunk. After it, other answers and ended ones have their turn.
CHUNK_SECONDS = 0.4
SMALLEST_CHUNK = 16
CachedTokens = tuple[list[int], list[Any]]  # tokens, and caches of layers that hold them


@dataclass(eq=False)
class Job:
    """A sequence to be generated."""

    request: Request
    prompt: Prompt
    # takes (index, event) by put, from the engine's thread: a Progress, a Token, or an error
    events: Any = field(default_factory=SimpleQueue)
    index: int = 0  # of this answer within its request
    address: str = ""  # of its client
    grammar: GrammarProcessor | None = None  # keeps the answer in a form
    cached: int = 0  # tokens of the prompt that a cache held
    n_guessed: int = 0  # tokens of the answer that were guessed
    ended: bool = False  # its last event has been emitted, or its client has left
    alone: bool = False  # goes on by itself, after a failure of a step that it shared

    def __post_init__(self):
        request = self.request
        self.served: ServedModel = request.served
        n_free = self.served.context - len(self.prompt.tokens)
        fields = request.fields
        self.max_tokens = n_free if fields.max_tokens is None else min(fields.max_tokens, n_free)
        self.settings = replace(self.served.settings, n_probes=fields.n_probes, dense=fields.dense)
        # OpenAI's seeds may be negative. MLX's random state decides nothing: it is left unusable by
        # a function that fails while MLX compiles it.
        seed = secrets.randbits(64) if fields.seed is None else fields.seed % 2**64 + self.index
        tokenizer = self.served.tokenizer
        self.sampler = make_sampler(
            fields.temperature,
            top_p=fields.top_p,
            min_p=fields.min_p,
            top_k=fields.top_k,
            xtc_probability=fields.xtc_probability,
            xtc_threshold=fields.xtc_threshold,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
            seed=seed,
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
        if self.grammar is not None:  # without its `begin`: a text may go on after a failure
            grammar = self.grammar
            self.processors.append(Mask(grammar.allowed, grammar.forced_tokens))
        self.tokens: list[int] = []  # that were generated, with the end token
        self.times: list[float] = []  # of the first and the last of them, by time.monotonic
        self._text = AnswerText(tokenizer, request.stop, self.prompt.state, self.prompt.keep_space)

    @property
    def kind(self) -> tuple:
        """What jobs of one batch have in common.

        A batch pads its caches to the longest one, so a long text would multiply the memory and the
        time of short questions.
        """
        # 0 up to 1,024 tokens, 1 up to 4,096, 2 up to 16,384 and so on
        length_class = max(0, (len(self.prompt.tokens) - 1).bit_length() - 9) // 2
        return self.served, self.settings, length_class

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
            raise ApiError(
                f"The form cannot be followed any further ({problem}): simplify it.",
                _field_of_form(self.request),
            )
        last = ends or len(self.tokens) >= self.max_tokens
        event = self._text.add(None if ends else token, last=last)
        if last:
            event.finish_reason = "stop" if ends else event.finish_reason or "length"
        if self.request.logprobs is not None and not ends:
            event.logprobs.append(token_logprobs(logprobs, token, self.request.logprobs))
        complete = event.finish_reason is not None
        self.ended |= complete
        self.emit(event)
        return complete


Decoded = tuple[Job, int, mx.array]  # a sequence, its next token, and logprobs (V,) there


def read_jobs(
    fields: dict[str, Any],
    *,
    chat: bool,
    models: list[ServedModel],
    flags: Namespace,
    events: Any = None,
    address: str = "",
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

    Raises:
        ApiError: If a field is wrong; it names the field.
    """
    request = Request(fields, chat=chat, models=models, flags=flags)
    prompts = read_prompts(request)
    grammar = _processor(request, prompts[0].state)
    each = [prompt for prompt in prompts for _ in range(request.fields.n)]
    return [
        Job(
            request,
            prompt,
            SimpleQueue() if events is None else events,
            index,
            address,
            grammar and grammar.for_sequence(),
        )
        for index, prompt in enumerate(each)
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
    begun = state == "reasoning"
    thought = None
    if tokenizer.has_thinking and (begun or tools.calls is not None):
        thought = ("" if begun else tokenizer.think_start, tokenizer.think_end)
    try:
        return GrammarProcessor(
            tokenizer,
            None if tools.required else request.grammar,
            calls=tools.calls,
            required=tools.required,
            thought=thought,
            seconds_per_mask=SECONDS_PER_MASK,
        )
    except ValueError as error:
        raise ApiError(str(error), _field_of_form(request)) from None


def _field_of_form(request: Request) -> str:
    """The field that an answer's form comes from."""
    return "tools" if request.grammar is None else "response_format"


def next_chunk(chunk: int, n_read: int, seconds: float, largest: int) -> int:
    """The number of tokens to read at once, after ``n_read`` of ``chunk`` took so long."""
    if seconds > CHUNK_SECONDS:
        return max(SMALLEST_CHUNK, n_read // 2)
    return min(2 * chunk, largest) if n_read == chunk and seconds < CHUNK_SECONDS / 3 else chunk


class Reading:
    """A prompt in the course of being read, up to its last token, with which the answer begins."""

    def __init__(self, job: Job, caches: LRUPromptCache, flags: Namespace):
        self.job = job
        self.jobs = [job]
        self._flags = flags
        self._all_tokens = job.all_tokens
        served = job.served
        # of all but the last token, from which the model goes on: -1 is no token
        before_last = [*self._all_tokens[:-1], -1]
        cache, rest = caches.fetch_nearest_cache(served.name, before_last)
        self.done = len(before_last) - len(rest)
        if cache is None:
            cache = make_prompt_cache(served.model)
            cache += [] if served.draft_model is None else make_prompt_cache(served.draft_model)
        self.cache: list[Any] = cache  # of a model's layers, and of its draft model's
        if not job.tokens:  # else it has begun before
            job.cached = self.done

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self._all_tokens) - 1 - self.done

    @property
    def cached(self) -> CachedTokens:
        """The tokens that have been read, and the caches that hold them."""
        return self._all_tokens[: self.done], self.cache

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes the sequence. Returns what has been read of it."""
        self.jobs = []
        return [self.cached]

    def read(self, chunk: int) -> int:
        """Reads the next tokens, at most a chunk, and reports this. Returns their number."""
        start = self.done
        step = self._flags.prefill_step_size
        stops = [*self.job.prompt.landmarks, start + self.left]
        if self._flags.kv_bits is not None:
            stops.append(start - start % step + step)
        end = min(start + chunk, *(stop for stop in stops if stop > start))
        self._compute(mx.array(self._all_tokens[start:end])[None])
        self.done = end
        # Where mlx-lm quantizes: what a chunk sees must not depend on how long chunks take.
        if end % step == 0 or self.left == 0:
            maybe_quantize_kv_cache(
                self.cache,
                quantized_kv_start=self._flags.quantized_kv_start,
                kv_group_size=self._flags.kv_group_size,
                kv_bits=self._flags.kv_bits,
            )
            mx.eval([layer.state for layer in self.cache])
        if self.left == 0:
            mx.clear_cache()
        self.job.emit(Progress(end, len(self._all_tokens)))
        return end - start

    def _compute(self, tokens: mx.array) -> None:
        """Runs the models over tokens (1, n), without computing their logits."""
        served = self.job.served
        n_caches = len(make_prompt_cache(served.model))
        served.model(tokens, cache=self.cache[:n_caches])
        if served.draft_model is not None:
            served.draft_model(tokens, cache=self.cache[n_caches:])
        mx.eval([layer.state for layer in self.cache])


class Batch:
    """Sequences of one kind, up to ``size``, whose tokens are verified together."""

    def __init__(self, job: Job, size: int, stream: mx.Stream):
        self.kind = job.kind
        self._generator = VerifiedBatchGenerator(
            job.served.model,
            completion_batch_size=size,
            prefill_batch_size=size,
            stream=stream,
            proposer=Proposer(job.served.model, job.settings),
        )
        self._jobs: dict[int, Job] = {}

    def add(self, reading: Reading) -> None:
        """Adds a sequence whose prompt has been read."""
        job = reading.job
        self._generator.logprobs = job.request.logprobs is not None
        tokens, cache = reading.cached
        (uid,) = self._generator.insert(
            [job.prompt.tokens[-1:]],
            [job.max_tokens + 1],  # one more, since jobs say when they end
            caches=[cache],
            all_tokens=[tokens],
            samplers=[job.sampler],
            logits_processors=[job.processors],
        )
        self._jobs[uid] = job

    @property
    def jobs(self) -> list[Job]:
        """The jobs that are being decoded."""
        return list(self._jobs.values())

    def step(self) -> list[Decoded]:
        """Takes one step. It may give no token of a sequence."""
        _, responses = self._generator.next()
        for response in responses:
            self._jobs[response.uid].n_guessed += response.from_draft
        return [(self._jobs[r.uid], r.token, r.logprobs) for r in responses]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes some of the sequences, at least one. Returns the tokens and caches of these."""
        uids = [uid for uid, job in self._jobs.items() if job in jobs]
        removed = self._generator.remove(uids, return_prompt_caches=True)
        self._jobs = {uid: job for uid, job in self._jobs.items() if job not in jobs}
        if not self._jobs:
            self._generator.close()
        return [(tokens, cache) for cache, tokens in removed.values()]


class Single:
    """A batch of one sequence, in the loop for one, or in mlx-lm's with a draft model."""

    def __init__(self, reading: Reading, flags: Namespace, stream: mx.Stream):
        job = reading.job
        self.jobs = [job]
        self._cache = reading.cache
        self._tokens = job.all_tokens
        self._n_cached = len(self._tokens) - 1  # tokens in the cache: not yet the prompt's last one
        model = job.served.model
        draft_model = job.served.draft_model
        proposer = Proposer(model, job.settings)
        loop: Any = partial(
            verified_steps,
            max_tokens=-1,  # without a limit, so that a step is launched after the last token
        )
        if draft_model is not None:
            loop = partial(
                drafted_steps,
                draft_model=draft_model,
                max_tokens=job.max_tokens,
                num_draft_tokens=job.request.fields.num_draft_tokens,
            )
        steps = loop(
            mx.array(self._tokens[-1:]),
            model,
            stream=stream,
            proposer=proposer,
            sampler=job.sampler,
            logits_processors=job.processors,
            prompt_cache=self._cache,
            context=reading.cached[0],
            logprobs=job.request.logprobs is not None,
            n_begun=len(job.tokens),
            kv_bits=flags.kv_bits,
            kv_group_size=flags.kv_group_size,
            quantized_kv_start=flags.quantized_kv_start,
        )
        self._loop = with_guesses(steps, proposer) if draft_model is None else steps

    def step(self) -> list[Decoded]:
        """Decodes the next token."""
        token, logprobs, guessed = next(self._loop)
        self._tokens.append(token)
        self._n_cached = len(self._tokens)
        self.jobs[0].n_guessed += guessed
        return [(self.jobs[0], token, logprobs)]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes the sequence. Returns its tokens and caches; nothing if they do not agree."""
        self.jobs = []
        self._loop.close()  # brings the cache to the tokens that were yielded
        if jobs[0].served.draft_model is not None:  # whose cache may be some tokens behind
            if not can_trim_prompt_cache(self._cache):
                return []
            self._n_cached = min(self._n_cached, *(cache.offset for cache in self._cache))
            for cache in self._cache:
                cache.trim(cache.offset - self._n_cached)
        return [(self._tokens[: self._n_cached], self._cache)]


Task = Reading | Batch | Single  # what is computed for some jobs
