"""Generates tokens for sequences whose prompts have been read.

Sequences of one model, one number of probes and similar lengths are a :class:`Batch`. A sequence
that cannot be in a batch, as with a draft model or a quantized cache, is a :class:`Single`. Batches
and singles take turns.
"""

from argparse import Namespace
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from ..lossless.batch import VerifiedBatchGenerator
from ..lossless.loop import drafted_steps, verified_steps
from ..lossless.policy import Proposer
from ..lossless.sampler import preserves_margins
from ..models.compat.mlx_lm import can_trim_prompt_cache
from .jobs import Job, LogitsProcessor
from .prefill import KVCaches, Reading

Step = tuple[Job, int, mx.array]  # a sequence, its next token, logprobs (V,) at its place
CachedTokens = tuple[list[int], KVCaches]  # tokens, and a cache that holds them


class Batch:
    """Sequences of one kind, up to ``size``, whose tokens are verified together.

    A batch pads every cache to the longest one. Prompts of similar lengths therefore share a batch:
    a long text does not multiply the memory and the time of short questions.
    """

    def __init__(self, job: Job, size: int, stream: mx.Stream):
        self.kind = kind_of(job)
        sizes: Any = {"completion_batch_size": size, "prefill_batch_size": size}
        model, self.proposer = job.served.model, _proposer(job)
        self._generator = VerifiedBatchGenerator(
            model, proposer=self.proposer, stream=stream, **sizes
        )
        self._jobs: dict[int, Job] = {}
        self._ended: dict[Job, CachedTokens] = {}  # at their greatest number of tokens

    def add(self, reading: Reading) -> None:
        """Adds a sequence whose prompt has been read."""
        job = reading.job
        self._generator.logprobs = job.request.logprobs is not None
        held: Any = {"caches": [reading.cache], "all_tokens": [reading.tokens]}
        held |= {"samplers": [job.sampler], "logits_processors": [_guarded(job)]}
        (uid,) = self._generator.insert([job.prompt.tokens[-1:]], [job.max_tokens], **held)
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
            "context": reading.tokens,
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
            options["num_draft_tokens"] = job.request.num_draft_tokens
            options["max_tokens"] = job.max_tokens
            self._steps = drafted_steps(start, served.model, served.draft_model, stream, **options)

    def step(self) -> list[Step]:
        (job,) = self.jobs
        token, logprobs = next(self._steps)[:2]
        self._tokens.append(token)
        return [(job, token, logprobs)]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        (job,), self.jobs = self.jobs, []
        self._steps.close()  # brings the cache to the tokens that were yielded
        n_held = len(self._tokens)
        if job.served.draft_model is not None:
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


def kind_of(job: Job) -> tuple:
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
