"""Sequences: their prompts are read a chunk at a time, then their tokens are generated.

Those of one model, one number of probes and similar lengths are a :class:`Batch`, which takes turns
with others. What no batch takes, as with a draft model or a quantized cache, is a :class:`Single`.
"""

from argparse import Namespace
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.drafting import drafted_steps
from ..decoding.keywords import CacheOptions
from ..decoding.loop import verified_steps
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..models.compat.mlx_lm import (
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    maybe_quantize_kv_cache,
)
from .jobs import Job, Progress

# Seconds of a chunk. After it, other answers and ended ones have their turn.
CHUNK_SECONDS = 0.4
SMALLEST_CHUNK = 16
CachedTokens = tuple[list[int], list[Any]]  # tokens, and caches of layers that hold them
Step = tuple[Job, int, mx.array]  # a sequence, its next token, logprobs (V,) at its place


def next_chunk(chunk: int, n_read: int, seconds: float, largest: int) -> int:
    """The number of tokens to read at once, after ``n_read`` of ``chunk`` took so long."""
    if seconds > CHUNK_SECONDS:
        return max(SMALLEST_CHUNK, n_read // 2)
    return min(2 * chunk, largest) if n_read == chunk and seconds < CHUNK_SECONDS / 3 else chunk


class Reading:
    """A prompt in the course of being read, up to its last token, with which the answer begins."""

    def __init__(self, job: Job, caches: LRUPromptCache, flags: Namespace, n_read: int):
        self.job = job
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
        self.due = n_read + self.left  # when so many tokens of all prompts have been read
        job.cached = self.done

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self._all_tokens) - 1 - self.done

    @property
    def cached(self) -> CachedTokens:
        """The tokens that have been read, and the caches that hold them."""
        return self._all_tokens[: self.done], self.cache

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
            self._quantize()
        if self.left == 0:
            mx.clear_cache()
        self.job.emit(Progress(end, len(self._all_tokens)))
        return end - start

    def _compute(self, tokens: mx.array) -> None:
        """Runs the models over tokens (1, n), without computing their logits."""
        served = self.job.served
        if served.draft_model is None:
            served.model(tokens, cache=self.cache)
        else:
            n_layers = len(served.model.layers)
            served.model(tokens, cache=self.cache[:n_layers])
            served.draft_model(tokens, cache=self.cache[n_layers:])
        mx.eval([layer.state for layer in self.cache])

    def _quantize(self) -> None:
        """Quantizes the layers' caches, from a length on, if the server's flags ask for it."""
        flags = self._flags
        maybe_quantize_kv_cache(
            self.cache,
            quantized_kv_start=flags.quantized_kv_start,
            kv_group_size=flags.kv_group_size,
            kv_bits=flags.kv_bits,
        )
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
            proposer=_proposer(job),
        )
        self._jobs: dict[int, Job] = {}
        self._ended: dict[int, CachedTokens] = {}  # at their greatest number of tokens

    def add(self, reading: Reading) -> None:
        """Adds a sequence whose prompt has been read."""
        job = reading.job
        self._generator.logprobs = job.request.logprobs is not None
        tokens, cache = reading.cached
        (uid,) = self._generator.insert(
            [job.prompt.tokens[-1:]],
            [job.max_tokens],
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

    def step(self) -> list[Step]:
        """Takes one step. It may give no token of a sequence."""
        _, responses = self._generator.next()
        for response in responses:
            if response.finish_reason is not None:
                self._ended[response.uid] = response.all_tokens, response.prompt_cache
        return [(self._jobs[r.uid], r.token, r.logprobs) for r in responses]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes some of the sequences, at least one. Returns the tokens and caches of these."""
        uids = [uid for uid, job in self._jobs.items() if job in jobs]
        left = [uid for uid in uids if uid not in self._ended]
        removed = self._generator.remove(left, return_prompt_caches=True)
        cached = [(tokens, cache) for cache, tokens in removed.values()]
        cached += [self._ended.pop(uid) for uid in uids if uid in self._ended]
        self._jobs = {uid: job for uid, job in self._jobs.items() if job not in jobs}
        if not self._jobs:
            self._generator.close()
        return cached


class Single:
    """A batch of one sequence, in the loop for one, or in mlx-lm's with a draft model."""

    def __init__(self, reading: Reading, flags: Namespace, stream: mx.Stream):
        job = reading.job
        self.jobs = [job]
        self._cache = reading.cache
        self._tokens = job.all_tokens
        self._held = len(self._tokens) - 1  # tokens in the cache: not yet the prompt's last one
        start = mx.array(self._tokens[-1:])
        model = job.served.model
        draft_model = job.served.draft_model
        quantized: CacheOptions = {
            "kv_bits": flags.kv_bits,
            "kv_group_size": flags.kv_group_size,
            "quantized_kv_start": flags.quantized_kv_start,
        }
        self._steps: Generator[tuple[Any, ...], None, None]
        if draft_model is None:
            self._steps = verified_steps(
                start,
                model,
                stream,
                proposer=_proposer(job),
                max_tokens=-1,  # without a limit, so that a step is launched after the last token
                sampler=job.sampler,
                logits_processors=job.processors,
                prompt_cache=self._cache,
                context=reading.cached[0],
                logprobs=job.request.logprobs is not None,
                n_begun=len(job.tokens),
                **quantized,
            )
        else:
            self._steps = drafted_steps(
                start,
                model,
                draft_model,
                stream,
                proposer=_proposer(job),
                max_tokens=job.max_tokens,
                num_draft_tokens=job.request.num_draft_tokens,
                sampler=job.sampler,
                logits_processors=job.processors,
                prompt_cache=self._cache,
                context=reading.cached[0],
                **quantized,
            )

    def step(self) -> list[Step]:
        """Decodes the next token."""
        token, logprobs = next(self._steps)[:2]
        self._tokens.append(token)
        self._held = len(self._tokens)
        return [(self.jobs[0], token, logprobs)]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes the sequence. Returns its tokens and caches; nothing if they do not agree."""
        self.jobs = []
        self._steps.close()  # brings the cache to the tokens that were yielded
        if jobs[0].served.draft_model is not None:  # whose cache may be some tokens behind
            if not can_trim_prompt_cache(self._cache):
                return []
            self._held = min(self._held, *(cache.offset for cache in self._cache))
            for cache in self._cache:
                cache.trim(cache.offset - self._held)
        return [(self._tokens[: self._held], self._cache)]


def _proposer(job: Job) -> Proposer:
    settings = DecodingSettings(
        verify=job.served.verify,
        dense=job.request.dense,
        n_probes=job.request.n_probes,
        max_wait=job.served.max_wait,
    )
    return Proposer(job.served.model, settings)
