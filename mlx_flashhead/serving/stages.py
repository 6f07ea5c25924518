"""Stages of answers: their prompts are read a chunk at a time, then their tokens are decoded.

Those of one model, one number of probes and similar lengths are a :class:`Batch`, which takes turns
with others. What no batch takes, as with a draft model or a quantized cache, is a :class:`Single`.
"""

from argparse import Namespace
from functools import partial
from typing import Any, cast

import mlx.core as mx

from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.drafting import drafted_tokens
from ..decoding.guessing.trained import TrainedDrafts
from ..decoding.loop import verified_tokens, with_guesses
from ..decoding.proposer import Proposer
from ..models.compat.mlx_lm import (
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    maybe_quantize_kv_cache,
)
from .answer_text import PromptProgress
from .jobs import Job

# Seconds of a chunk. After it, other answers and ended ones have their turn.
CHUNK_SECONDS = 0.4
SMALLEST_CHUNK = 16
CachedTokens = tuple[list[int], list[Any]]  # tokens, and caches of layers that hold them
Decoded = tuple[Job, int, mx.array]  # a sequence, its next token, and logprobs (V,) there


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
            if served.draft_model is not None:
                cache += make_prompt_cache(served.draft_model)
        self.cache: list[Any] = cache  # of a model's layers, and of its draft model's
        self.drafts = self._new_drafts()
        if not job.tokens:  # else it has begun before
            job.cached = self.done

    def _new_drafts(self) -> TrainedDrafts | None:
        """What a trained drafter guesses in the answer; it hears the prompt."""
        served = self.job.served
        if served.drafter is None:
            return None
        self._proposer = Proposer(served.model, self.job.settings)
        self._proposer.hear_states()
        n_drafts = self.job.request.fields.num_draft_tokens
        drafts = TrainedDrafts(served.drafter, served.model, n_drafts, list)
        if self.done:
            drafts.hear(self._all_tokens[: self.done], None)
        return drafts

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
        ends = [start + chunk, start + self.left]
        ends += [landmark for landmark in self.job.prompt.landmarks if landmark > start]
        if self._flags.kv_bits is not None:
            ends.append(start - start % step + step)
        end = min(ends)
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
        self.job.emit(PromptProgress(end, len(self._all_tokens)))
        return end - start

    def _compute(self, tokens: mx.array) -> None:
        """Runs the models over tokens (1, n), without computing their logits."""
        served = self.job.served
        n_caches = len(make_prompt_cache(served.model))
        if self.drafts is not None:
            states: list[mx.array] = []
            with self._proposer.reading(states):
                served.model(tokens, cache=self.cache)
            self.drafts.hear(cast(list[int], tokens[0].tolist()), states[-1][0] if states else None)
        else:
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
        if reading.drafts is not None:
            self._generator.take_drafts(uid, reading.drafts)
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
        draft_model = job.served.draft_model or job.served.drafter
        proposer = Proposer(model, job.settings)
        loop: Any = partial(
            verified_tokens,
            max_tokens=-1,  # without a limit, so that a step is launched after the last token
        )
        if draft_model is not None:
            loop = partial(
                drafted_tokens,
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


Stage = Reading | Batch | Single  # of some jobs
