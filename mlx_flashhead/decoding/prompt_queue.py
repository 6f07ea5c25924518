"""The prompts of a batch, read by mlx-lm's own class.

So chunks and padding, and with them the rounding, are mlx-lm's.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_lm import BatchCounters, PromptProcessingBatch

Held = tuple[list[Any], list[int]]  # caches of layers, and the tokens in them


@dataclass
class Waiting:
    """A prompt of which nothing has been read."""

    uid: int
    segments: list[list[int]]  # the last one is the last token alone
    cache: list[Any]
    tokens: list[int]  # that the cache holds


@dataclass
class Started:
    """Prompts that have been read but for their last tokens."""

    uids: list[int]
    cache: list[Any]  # of their batch
    last: mx.array  # (R,) tokens


class PromptQueue:
    """Reads the prompts of a batch, up to ``batch_size`` at a time, as mlx-lm's ``BatchGenerator``.

    Args:
        model: The model.
        batch_size: Prompts that are read at once, at most.
        step_size: Tokens of each that are read at once, at most.
        counters: Where tokens and times are counted.
    """

    def __init__(self, model: nn.Module, batch_size: int, step_size: int, counters: BatchCounters):
        self._model = model
        self._batch_size = batch_size
        self._step_size = step_size
        self._counters = counters
        self._waiting: deque[Waiting] = deque()
        self._batch = self._new_batch([], [], [])
        self._left: list[list[list[int]]] = []  # segments of each prompt in the batch
        self._progress: list[tuple[int, int]] = []  # tokens read of each, and in all

    def add(self, prompts: list[Waiting]) -> None:
        """Adds prompts that wait to be read."""
        self._waiting.extend(prompts)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        nbytes = 0
        for prompt in self._waiting:
            nbytes += sum(layer.nbytes for layer in prompt.cache)
        for layer in self._batch.prompt_cache:
            nbytes += layer.nbytes
        return nbytes

    def held(self, uid: int) -> Held | None:
        """A prompt's caches and the tokens in them; None if it is not here."""
        for prompt in self._waiting:
            if prompt.uid == uid:
                return prompt.cache, prompt.tokens
        if uid not in self._batch.uids:
            return None
        row = self._batch.uids.index(uid)
        return self._batch.extract_cache(row), self._batch.tokens[row]

    def remove(self, uids: list[int]) -> None:
        """Drops prompts, wherever they are."""
        self._waiting = deque(prompt for prompt in self._waiting if prompt.uid not in uids)
        kept = [row for row, uid in enumerate(self._batch.uids) if uid not in uids]
        if len(kept) < len(self._batch):
            self._batch.filter(kept)
            self._left = [self._left[row] for row in kept]
            self._progress = [self._progress[row] for row in kept]

    def begin(self, n_free: int) -> None:
        """Takes waiting prompts into the batch, where ``n_free`` texts may still be added."""
        n = min(self._batch_size - len(self._batch), n_free, len(self._waiting))
        if n <= 0:
            return
        taken = [self._waiting.popleft() for _ in range(n)]
        batch = self._new_batch(
            [prompt.uid for prompt in taken],
            [prompt.cache for prompt in taken],
            [prompt.tokens for prompt in taken],
        )
        self._batch.extend(batch)
        self._left += [prompt.segments for prompt in taken]
        self._progress += [(0, sum(map(len, prompt.segments))) for prompt in taken]

    def start(self) -> tuple[Started | None, list[Any]]:
        """Takes out the prompts of which only the last token is left, with their responses."""
        rows = [i for i, left in enumerate(self._left) if len(left) == 1 and len(left[0]) == 1]
        if not rows:
            return None, []
        last = [self._left[row][0][0] for row in rows]
        totals = [self._progress[row][1] for row in rows]
        kept = [row for row in range(len(self._left)) if row not in rows]
        self._left = [self._left[row] for row in kept]
        self._progress = [self._progress[row] for row in kept]
        batch = self._batch.split(rows)
        responses = [
            PromptProcessingBatch.Response(uid, (total, total), True, True)
            for uid, total in zip(batch.uids, totals, strict=True)
        ]
        return Started(list(batch.uids), batch.prompt_cache, mx.array(last)), responses

    def read(self) -> list[Any]:
        """Reads the next chunk of each prompt. Returns their responses."""
        chunks = []
        responses = []
        for row, segments in enumerate(self._left):
            chunk = segments[0][: self._step_size]
            segments[0] = segments[0][len(chunk) :]
            at_end = not segments[0]
            if at_end:
                segments.pop(0)
            done, total = self._progress[row]
            self._progress[row] = (done + len(chunk), total)
            uid = self._batch.uids[row]
            responses.append(
                PromptProcessingBatch.Response(uid, self._progress[row], at_end, False)
            )
            chunks.append(chunk)
        self._counters.prompt_tokens += sum(map(len, chunks))
        began = time.perf_counter()
        self._batch.prompt(chunks)
        self._counters.prompt_time += time.perf_counter() - began
        return responses

    def _new_batch(self, uids: list[int], caches: list[Any], tokens: list[list[int]]) -> Any:
        """A batch of mlx-lm's, of which only the prompts matter here."""
        return PromptProcessingBatch(
            self._model,
            uids,
            caches,
            tokens,
            prefill_step_size=self._step_size,
            samplers=cast(Any, [None] * len(uids)),
            logits_processors=[[] for _ in uids],
        )
