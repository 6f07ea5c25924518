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
# Tokens, and caches of layers that hold them.
CachedTokens = tuple[list[int], list[Any]]
# A job, its next token, and the logprobs (V,) there.
Decoded = tuple[Job, int, mx.array]


def next_chunk(chunk: int, n_read: int, seconds: float, largest: int) -> int:
    """The number of tokens to read at once, after ``n_read`` of ``chunk`` took so long."""
    if seconds > CHUNK_SECONDS:
        return max(SMALLEST_CHUNK, n_read // 2)
    if n_read == chunk and seconds < CHUNK_SECONDS / 3:
        return min(2 * chunk, largest)
    return chunk


class Reading:
    """A prompt in the course of being read, up to its last token, with which the answer begins."""

    def __init__(self, job: Job, caches: LRUPromptCache, flags: Namespace):
        self.job = job
        self.jobs = [job]
        self._flags = flags
        self._all_tokens = job.all_tokens
        served = job.served
        # The model goes on from the last token, so the caches need those before it. -1 is no token.
        before_last = [*self._all_tokens[:-1], -1]
        cache, rest = caches.fetch_nearest_cache(served.name, before_last)
        self.done = len(before_last) - len(rest)
        if cache is None:
            cache = make_prompt_cache(served.model)
            if served.draft_model is not None:
                cache += make_prompt_cache(served.draft_model)
        # The caches of the model's layers, and then those of its draft model's.
        self.cache: list[Any] = cache
        # It hears the states of the prompt for a trained drafter.
        self._proposer = Proposer(served.model, job.settings)
        self.drafts = self._new_drafts()
        # A job that goes on after a failure has tokens already.
        if not job.tokens:
            job.cached = self.done

    def _new_drafts(self) -> TrainedDrafts | None:
        """What a trained drafter guesses in the answer; it hears the prompt."""
        served = self.job.served
        if served.drafter is None:
            return None
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
        """Removes the answer. Returns what has been read of its prompt."""
        self.jobs = []
        return [self.cached]

    def read(self, chunk: int) -> int:
        """Reads the next tokens, at most a chunk, and reports this. Returns their number."""
        start = self.done
        step_size = self._flags.prefill_step_size
        ends = [start + chunk, start + self.left]
        ends += [landmark for landmark in self.job.prompt.landmarks if landmark > start]
        if self._flags.kv_bits is not None:
            ends.append(start - start % step_size + step_size)
        end = min(ends)
        self._compute(mx.array(self._all_tokens[start:end])[None])
        self.done = end
        # Where mlx-lm quantizes: what a chunk sees must not depend on how long chunks take.
        if end % step_size == 0 or self.left == 0:
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
            last_states = None
            if states:
                last_states = states[-1][0]
            self.drafts.hear(cast(list[int], tokens[0].tolist()), last_states)
        else:
            served.model(tokens, cache=self.cache[:n_caches])
            if served.draft_model is not None:
                served.draft_model(tokens, cache=self.cache[n_caches:])
        mx.eval([layer.state for layer in self.cache])


class Batch:
    """Answers with the same ``batch_key``, up to ``size``, whose tokens are verified together."""

    def __init__(self, job: Job, size: int, stream: mx.Stream):
        self.key = job.batch_key
        self._generator = VerifiedBatchGenerator(
            job.served.model,
            completion_batch_size=size,
            prefill_batch_size=size,
            stream=stream,
            proposer=Proposer(job.served.model, job.settings),
        )
        self._jobs: dict[int, Job] = {}

    def add(self, reading: Reading) -> None:
        """Adds an answer whose prompt has been read."""
        job = reading.job
        self._generator.logprobs = job.request.logprobs is not None
        tokens, cache = reading.cached
        # The limit is a token more, since jobs say when they end.
        (uid,) = self._generator.insert(
            [job.prompt.tokens[-1:]],
            [job.max_tokens + 1],
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
        """Takes one step. It may give no token of an answer."""
        _, responses = self._generator.next()
        decoded = []
        for response in responses:
            job = self._jobs[response.uid]
            if response.from_draft:
                job.n_guessed += 1
            decoded.append((job, response.token, response.logprobs))
        return decoded

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes some of the answers, at least one. Returns the tokens and caches of these."""
        uids = [uid for uid, job in self._jobs.items() if job in jobs]
        removed = self._generator.remove(uids, return_prompt_caches=True)
        self._jobs = {uid: job for uid, job in self._jobs.items() if job not in jobs}
        if not self._jobs:
            self._generator.close()
        return [(tokens, cache) for cache, tokens in removed.values()]


class Single:
    """An answer by itself, in the loop of one text, perhaps with what drafts."""

    def __init__(self, reading: Reading, flags: Namespace, stream: mx.Stream):
        job = reading.job
        self.jobs = [job]
        self._cache = reading.cache
        self._tokens = job.all_tokens
        # The cache has all tokens but the prompt's last one.
        self._n_cached = len(self._tokens) - 1
        model = job.served.model
        draft_model = job.served.draft_model or job.served.drafter
        proposer = Proposer(model, job.settings)
        # Without a limit a step is launched after the last token.
        loop: Any = partial(verified_tokens, max_tokens=-1)
        if draft_model is not None:
            loop = partial(
                drafted_tokens,
                draft_model=draft_model,
                max_tokens=job.max_tokens,
                num_draft_tokens=job.request.fields.num_draft_tokens,
            )
        self._loop = loop(
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
        if draft_model is None:
            self._loop = with_guesses(self._loop, proposer)

    def step(self) -> list[Decoded]:
        """Decodes the next token."""
        token, logprobs, is_guessed = next(self._loop)
        self._tokens.append(token)
        self._n_cached = len(self._tokens)
        if is_guessed:
            self.jobs[0].n_guessed += 1
        return [(self.jobs[0], token, logprobs)]

    def remove(self, jobs: list[Job]) -> list[CachedTokens]:
        """Removes the answer. Returns its tokens and caches; nothing if they do not agree."""
        self.jobs = []
        # A loop that is closed brings the cache to the tokens that it has yielded.
        self._loop.close()
        if jobs[0].served.draft_model is not None:
            # The draft model's cache may be some tokens behind.
            if not can_trim_prompt_cache(self._cache):
                return []
            self._n_cached = min(self._n_cached, *(cache.offset for cache in self._cache))
            for cache in self._cache:
                cache.trim(cache.offset - self._n_cached)
        return [(self._tokens[: self._n_cached], self._cache)]


# A stage of some jobs.
Stage = Reading | Batch | Single
