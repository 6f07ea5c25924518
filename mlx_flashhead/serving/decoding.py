"""Sequences: their prompts are read a chunk at a time, then their tokens are generated.

Those of one model, one number of probes and similar lengths are a :class:`Batch`, which takes turns
with others. What no batch takes, as with a draft model or a quantized cache, is a :class:`Single`.
"""

from argparse import Namespace
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.loop import drafted_steps, verified_steps
from ..decoding.policy import Proposer
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
        self.job, self._flags = job, flags
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
        return self._all_tokens[: self.done], self.cache

    def read(self, chunk: int) -> int:
        """Reads the next tokens, at most a chunk, and reports this. Returns their number."""
        start = self.done
        stops = (*self.job.prompt.landmarks, start + self.left)
        end = min(start + chunk, *(stop for stop in stops if stop > start))
        self._compute(mx.array(self._all_tokens[start:end])[None])
        self.done = end
        if self.left == 0:
            mx.clear_cache()
        self.job.emit(Progress(end, len(self._all_tokens)))
        return end - start

    def _compute(self, tokens: mx.array) -> None:
        """Runs the models over tokens (1, n), without computing their logits."""
        served, flags = self.job.served, self._flags
        n_layers = len(self.cache) if served.draft_model is None else len(served.model.layers)
        parts = [(served.model, self.cache[:n_layers]), (served.draft_model, self.cache[n_layers:])]
        for model, layers in parts:
            if model is not None:
                model(tokens, cache=layers)
                settings = flags.quantized_kv_start, flags.kv_group_size, flags.kv_bits
                maybe_quantize_kv_cache(layers, *settings)
        self.cache = [layer for _, layers in parts for layer in layers]
        mx.eval([layer.state for layer in self.cache])


class Batch:
    """Sequences of one kind, up to ``size``, whose tokens are verified together."""

    def __init__(self, job: Job, size: int, stream: mx.Stream):
        self.kind = job.kind
        sizes: Any = {"completion_batch_size": size, "prefill_batch_size": size, "stream": stream}
        sizes["proposer"] = _proposer(job)
        self._generator = VerifiedBatchGenerator(job.served.model, **sizes)
        self._jobs: dict[int, Job] = {}
        self._ended: dict[int, CachedTokens] = {}  # at their greatest number of tokens

    def add(self, reading: Reading) -> None:
        """Adds a sequence whose prompt has been read."""
        job = reading.job
        self._generator.logprobs = job.request.logprobs is not None
        (tokens, cache), last = reading.cached, job.prompt.tokens[-1:]
        held: Any = {"caches": [cache], "all_tokens": [tokens], "samplers": [job.sampler]}
        held |= {"logits_processors": [job.processors]}
        (uid,) = self._generator.insert([last], [job.max_tokens], **held)
        self._jobs[uid] = job

    @property
    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def step(self) -> list[Step]:
        """Takes one step. Of each sequence it may give no token, or several."""
        _, responses = self._generator.next()
        ended = (r for r in responses if r.finish_reason is not None)
        self._ended |= {r.uid: (r.all_tokens, r.prompt_cache) for r in ended}
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
        job, served = reading.job, reading.job.served
        self.jobs, self._cache, self._tokens = [job], reading.cache, job.all_tokens
        options: dict[str, Any] = {
            "sampler": job.sampler,
            "prompt_cache": self._cache,
            "context": reading.cached[0],
            "proposer": _proposer(job),
            "logits_processors": job.processors,
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
        if jobs[0].served.draft_model is not None:  # whose cache may be some tokens behind
            if not can_trim_prompt_cache(self._cache):
                return []
            n_held = min(n_held, *(cache.offset for cache in self._cache))
            for cache in self._cache:
                cache.trim(cache.offset - n_held)
        return [(self._tokens[:n_held], self._cache)]


def _proposer(job: Job) -> Proposer:
    served, request = job.served, job.request
    how: Any = {"verify": served.verify, "max_wait": served.max_wait}
    return Proposer(served.model, dense=request.dense, n_probes=request.n_probes, **how)
