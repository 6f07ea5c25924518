"""Sequences: their prompts are read a chunk at a time, then their tokens are generated.

Sequences of one model, one number of probes and similar lengths are a :class:`Batch`. A sequence
that cannot be in a batch, as with a draft model or a quantized cache, is a :class:`Single`. Batches
and singles take turns.
"""

import time
from argparse import Namespace
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx

from ..lossless.batch import VerifiedBatchGenerator
from ..lossless.loop import drafted_steps, verified_steps
from ..lossless.policy import Proposer
from ..lossless.sequence import preserves_margins
from ..models.compat.mlx_lm import (
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    maybe_quantize_kv_cache,
    trim_prompt_cache,
)
from .jobs import Job, LogitsProcessor, Progress

# Seconds of a chunk. After it, other answers and cancelled requests have their turn.
CHUNK_SECONDS = 0.4
SMALLEST_CHUNK = 16
KVCaches = list[Any]  # of a model's layers, and of its draft model's
CachedTokens = tuple[list[int], KVCaches]  # tokens, and a cache that holds them
Step = tuple[Job, int, mx.array]  # a sequence, its next token, logprobs (V,) at its place


class PrefillPace:
    """The number of tokens of a prompt to read at once, from the time of the chunks before."""

    def __init__(self, largest: int):
        self._largest = largest
        self.n_tokens = min(2 * SMALLEST_CHUNK, largest)

    def took(self, n_tokens: int, seconds: float) -> None:
        """Notes the time of a chunk."""
        if seconds > CHUNK_SECONDS:
            self.n_tokens = max(SMALLEST_CHUNK, n_tokens // 2)
        elif n_tokens == self.n_tokens and seconds < CHUNK_SECONDS / 3:
            self.n_tokens = min(2 * n_tokens, self._largest)


class Reading:
    """A prompt in the course of being read, up to its last token, with which the answer begins."""

    due = 0  # when so many tokens of all prompts have been read

    def __init__(self, job: Job, caches: LRUPromptCache, flags: Namespace):
        self.job, self._flags = job, flags
        self._all_tokens = job.all_tokens
        served = job.served
        self._models = [model for model in (served.model, served.draft_model) if model is not None]
        tokens = self._all_tokens
        # the cache of most of the prompt but its last token, from which the model goes on
        cache, rest = caches.fetch_nearest_cache(served.name, tokens)
        if not rest and can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        elif not rest:
            tokens = tokens[:-1]
            cache, rest = caches.fetch_nearest_cache(served.name, tokens)
        self.done = len(tokens) - len(rest)
        if cache is None:
            cache = [layer for model in self._models for layer in make_prompt_cache(model)]
        self.cache: KVCaches = cache
        if not job.alone:
            job.cached = self.done

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self._all_tokens) - 1 - self.done

    @property
    def cached(self) -> CachedTokens:
        return self._all_tokens[: self.done], self.cache

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache)

    def read(self, pace: PrefillPace) -> int:
        """Reads the next chunk and reports the progress. Returns the number of its tokens."""
        prompt, start = self.job.prompt, self.done
        stops = (*prompt.landmarks, start + self.left)
        # a small rest is read along, since few tokens take almost as long as many
        n_tokens = self.left if self.left <= 1.5 * pace.n_tokens else pace.n_tokens
        end = min(start + n_tokens, *(stop for stop in stops if stop > start))
        began = time.perf_counter()
        self._compute(mx.array(self._all_tokens[start:end])[None])
        pace.took(end - start, time.perf_counter() - began)
        self.done = end
        if self.left == 0:
            mx.clear_cache()
        if not self.job.alone:
            self.job.emit(Progress(end, len(prompt.tokens)))
        return end - start

    def _compute(self, tokens: mx.array) -> None:
        """Runs the models over tokens (1, n), without computing their logits."""
        flags, cache = self._flags, self.cache
        self.cache = []
        for model in self._models:
            n_layers = len(model.layers) if model is not self._models[-1] else len(cache)
            layers, cache = cache[:n_layers], cache[n_layers:]
            model(tokens, cache=layers)
            settings = flags.quantized_kv_start, flags.kv_group_size, flags.kv_bits
            maybe_quantize_kv_cache(layers, *settings)
            self.cache += layers
        mx.eval([layer.state for layer in self.cache])


def next_reading(readings: Sequence[Reading], turn: int) -> Reading:
    """Whose chunk is next.

    A prompt of n tokens is due when n tokens have been read since it came. Every other chunk is of
    the one that is due first, so short questions do not hold up a longer one for ever. The others
    are of the one with the fewest tokens left, so a long text does not hold up a short question.
    """
    return min(readings, key=lambda reading: reading.due if turn % 2 else reading.left)


class Batch:
    """Sequences of one kind, up to ``size``, whose tokens are verified together.

    A batch pads every cache to the longest one. Prompts of similar lengths therefore share a batch:
    a long text does not multiply the memory and the time of short questions.
    """

    def __init__(self, job: Job, size: int, stream: mx.Stream):
        self._kind, self.proposer = _kind_of(job), _proposer(job)
        sizes: Any = {"completion_batch_size": size, "prefill_batch_size": size, "stream": stream}
        self._generator = VerifiedBatchGenerator(job.served.model, proposer=self.proposer, **sizes)
        self._jobs: dict[int, Job] = {}
        self._ended: dict[Job, CachedTokens] = {}  # at their greatest number of tokens

    def fits(self, job: Job) -> bool:
        return self._kind == _kind_of(job)

    def add(self, reading: Reading) -> None:
        """Adds a sequence whose prompt has been read."""
        job = reading.job
        self._generator.logprobs = job.request.logprobs is not None
        (tokens, cache), last = reading.cached, job.prompt.tokens[-1:]
        held: Any = {"caches": [cache], "all_tokens": [tokens], "samplers": [job.sampler]}
        held |= {"logits_processors": [_guarded(job)]}
        (uid,) = self._generator.insert([last], [job.max_tokens], **held)
        self._jobs[uid] = job

    @property
    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def step(self) -> list[Step]:
        """Takes one step. Of each sequence it may give no token, or several."""
        _, responses = self._generator.next()
        for response in responses:
            if response.finish_reason is not None:
                job = self._jobs[response.uid]
                self._ended[job] = (response.all_tokens, response.prompt_cache)
        return [(self._jobs[r.uid], r.token, r.logprobs) for r in responses]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes some of the sequences, at least one. Returns the tokens and caches of these."""
        uids = [uid for uid, job in self._jobs.items() if job in jobs]
        left = [uid for uid in uids if self._jobs[uid] not in self._ended]
        removed = self._generator.remove(left, return_prompt_caches=True)
        cached = [(tokens, cache) for cache, tokens in removed.values()]
        gone = [self._jobs.pop(uid) for uid in uids]
        cached += [self._ended.pop(job) for job in gone if job in self._ended]
        if not self._jobs:
            self._generator.close()
        return cached

    @property
    def nbytes(self) -> int:
        return self._generator.prompt_cache_nbytes


class Single:
    """A batch of one sequence, in the loop for one, or in mlx-lm's with a draft model."""

    def __init__(self, reading: Reading, flags: Namespace, stream: mx.Stream):
        job, served = reading.job, reading.job.served
        self.jobs, self._cache, self._tokens = [job], reading.cache, job.all_tokens
        self.proposer = _proposer(job)
        options: dict[str, Any] = {
            "sampler": job.sampler,
            "prompt_cache": self._cache,
            "context": reading.cached[0],
            "proposer": self.proposer,
            "logits_processors": _guarded(job),
            "kv_bits": flags.kv_bits,
            "kv_group_size": flags.kv_group_size,
            "quantized_kv_start": flags.quantized_kv_start,
        }
        start = mx.array(self._tokens[-1:])
        self._steps: Generator[tuple[Any, ...], None, None]
        if served.draft_model is None:
            options |= {"logprobs": job.request.logprobs is not None, "n_begun": len(job.tokens)}
            # without a limit, so that its cache holds all tokens that it has yielded
            self._steps = verified_steps(start, served.model, stream, max_tokens=-1, **options)
        else:
            options |= {"num_draft_tokens": job.request.num_draft_tokens}
            options |= {"max_tokens": job.max_tokens}
            self._steps = drafted_steps(start, served.model, served.draft_model, stream, **options)

    def step(self) -> list[Step]:
        token, logprobs = next(self._steps)[:2]
        self._tokens.append(token)
        return [(self.jobs[0], token, logprobs)]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        self.jobs = []
        self._steps.close()  # brings the cache to the tokens that were yielded
        n_held = len(self._tokens)
        if jobs[0].served.draft_model is not None:
            # a draft model's cache may be some tokens behind
            if not can_trim_prompt_cache(self._cache):
                return []
            n_held = min(n_held, *(cache.offset for cache in self._cache))
            for cache in self._cache:
                cache.trim(cache.offset - n_held)
        return [(self._tokens[:n_held], self._cache)]

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._cache)


def _kind_of(job: Job) -> tuple:
    """What sequences of one batch have in common."""
    # 0 up to 1,024 tokens, 1 up to 4,096, 2 up to 16,384 and so on
    length_class = max(0, (len(job.prompt.tokens) - 1).bit_length() - 9) // 2
    return job.served, job.request.n_probes, job.request.dense, length_class


def _proposer(job: Job) -> Proposer:
    served, request = job.served, job.request
    how: Any = {"verify": served.verify, "max_wait": served.max_wait}
    return Proposer(served.model, dense=request.dense, n_probes=request.n_probes, **how)


def _guarded(job: Job) -> list[LogitsProcessor]:
    """A sequence's processors, whose failures end this one alone."""

    def guarded(processor: LogitsProcessor) -> LogitsProcessor:
        def run(tokens: mx.array, logits: mx.array) -> mx.array:
            if job.error is None:
                try:
                    return processor(tokens, logits)
                except BaseException as error:  # a panic of a library in Rust is no Exception
                    job.error = error
            return logits

        run.preserves_margins = preserves_margins(processor)  # type: ignore[attr-defined]
        return run

    return [guarded(processor) for processor in job.processors]
