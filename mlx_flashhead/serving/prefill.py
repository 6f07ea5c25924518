"""Reads prompts into caches, a chunk at a time, from the longest beginning in a cache."""

import copy
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx

from ..models.compat.mlx_lm import (
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    maybe_quantize_kv_cache,
    trim_prompt_cache,
)
from .jobs import Job, Progress
from .served_models import ServedModel

# Seconds of a chunk. After it, other answers and cancelled requests have their turn.
CHUNK_SECONDS = 0.4
SMALLEST_CHUNK = 16
KVCaches = list[Any]  # of a model's layers, and of its draft model's


class PromptCaches:
    """mlx-lm's store of so many caches, and bytes of these and of those in use together."""

    def __init__(self, max_size: int, max_bytes: int | None):
        self._caches, self._max_bytes = LRUPromptCache(max_size), max_bytes

    def find(self, served: ServedModel, tokens: list[int]) -> tuple[KVCaches | None, int]:
        """A copy of the cache that holds most of a prompt, and its number of tokens.

        It leaves out the prompt's last token, from which the model goes on.
        """
        cache, rest = self._caches.fetch_nearest_cache(served.name, tokens)
        if not rest and can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        elif not rest:
            tokens = tokens[:-1]
            cache, rest = self._caches.fetch_nearest_cache(served.name, tokens)
        return cache, len(tokens) - len(rest)

    def store(
        self,
        served: ServedModel,
        tokens: list[int],
        cache: KVCaches,
        kind: str = "assistant",
        in_use: Iterable[int] = (),
    ) -> None:
        """Stores a cache of these tokens, which must not change any more.

        Then drops caches until all fit beside those in use, which have these bytes. Of mlx-lm's
        kinds "system", "user" and "assistant" the last is dropped first.
        """
        if tokens:
            # evaluated, since an unevaluated part of a batch's cache keeps the whole of it
            mx.eval([layer.state for layer in cache])
            self._caches.insert_cache(served.name, tokens, cache, cache_type=kind)
        if self._max_bytes is not None:
            self._caches.trim_to(n_bytes=self._max_bytes - sum(in_use))


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


class ReadingQueue:
    """The prompts that are being read, and whose chunk is next.

    A prompt of n tokens is due when n tokens have been read since it came. Every other chunk is of
    the one that is due first, so short questions do not hold up a longer one for ever. The others
    are of the one with the fewest tokens left, so a long text does not hold up a short question.
    """

    def __init__(self) -> None:
        self._readings: dict[Reading, int] = {}  # with the count of tokens at which each is due
        self._n_read = 0
        self._turn = 0

    def __iter__(self) -> Iterator["Reading"]:
        return iter([*self._readings])

    def __len__(self) -> int:
        return len(self._readings)

    def add(self, reading: "Reading") -> None:
        self._readings[reading] = self._n_read + reading.left

    def remove(self, reading: "Reading") -> None:
        del self._readings[reading]

    def next(self) -> "Reading":
        """Whose chunk is next."""
        self._turn += 1
        return min(self, key=self._readings.__getitem__ if self._turn % 2 else lambda r: r.left)

    def read(self, reading: "Reading", pace: PrefillPace) -> None:
        before = reading.left
        reading.read(pace)
        self._n_read += before - reading.left


class Reading:
    """A prompt in the course of being read, up to its last token, with which the answer begins.

    The caches of earlier prompts also take those of this prompt's landmarks.
    """

    def __init__(self, job: Job, caches: PromptCaches, flags: Namespace):
        self.job, self._caches, self._flags = job, caches, flags
        self._all_tokens = job.all_tokens
        served = job.served
        self._models = [model for model in (served.model, served.draft_model) if model is not None]
        cache, self.done = caches.find(served, self._all_tokens)
        new = (layer for model in self._models for layer in make_prompt_cache(model))
        self.cache: KVCaches = [*new] if cache is None else cache
        if not job.alone:
            job.cached = self.done

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self._all_tokens) - 1 - self.done

    @property
    def tokens(self) -> list[int]:
        """Tokens that the cache holds."""
        return self._all_tokens[: self.done]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache)

    def read(self, pace: PrefillPace) -> None:
        """Reads the next chunk and reports the progress."""
        prompt = self.job.prompt
        stops = (*prompt.landmarks, self.done + self.left)
        # a small rest is read along, since few tokens take almost as long as many
        n_tokens = self.left if self.left <= 1.5 * pace.n_tokens else pace.n_tokens
        end = min(self.done + n_tokens, *(stop for stop in stops if stop > self.done))
        began = time.perf_counter()
        self._compute(mx.array(self._all_tokens[self.done : end])[None])
        pace.took(end - self.done, time.perf_counter() - began)
        self.done = end
        if end in prompt.landmarks:
            self._caches.store(self.job.served, self.tokens, copy.deepcopy(self.cache), "user")
        if self.left == 0:
            mx.clear_cache()
        if not self.job.alone:
            self.job.emit(Progress(self.done, len(prompt.tokens)))

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
