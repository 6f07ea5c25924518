"""Texts that are generated together: mlx-lm's batch, with the check over all of its rows. A text
with another choice leaves it with its cache, goes back, and joins it again."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.generate import BatchGenerator
from .proposals import Proposer
from .rollback import Mark, go_back, kept
from .sequence import Position, Text
from .verify import Pace

NO_LOGPROBS = mx.zeros((1,))
IN_GENERATION = 2  # the stage of a text in mlx-lm's batch


@dataclass
class Response:
    uid: int
    token: int
    logprobs: mx.array
    finish_reason: str | None
    prompt_cache: list[Any] | None
    all_tokens: list[int] | None


class VerifiedBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator`` with the choices of the dense model.

    A call of :meth:`next` may give no token of a text, or several. ``stop_tokens`` are sequences
    that end a text. ``logprobs``: whether they are wanted of texts that are inserted from now on.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        proposer: Proposer,
        max_tokens: int = 128,
        stop_tokens: Sequence[Sequence[int]] | None = None,
        sampler: Any = None,
        logits_processors: Any = None,
        logprobs: bool = True,
        **options: Any,
    ):
        super().__init__(model, max_tokens=max_tokens, **options)
        self._proposer = proposer
        self._usual = sampler, logits_processors or []
        self._stops = [list(stop) for stop in stop_tokens or () if stop]
        self._texts: dict[int, Text] = {}  # by their numbers in mlx-lm's batch
        self._n_texts = 0
        self._pace = Pace(proposer, self._marks)
        self.logprobs = logprobs

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int] | None = None,
        caches: list[Any] | None = None,
        all_tokens: list[list[int]] | None = None,
        samplers: list[Any] | None = None,
        logits_processors: list[Any] | None = None,
        stop_sequences: list[Any] | None = None,
    ) -> list[int]:
        """As ``BatchGenerator.insert_segments``, with one set of stop tokens for all texts. A
        processor with ``for_sequence`` makes another one for each text."""
        first = self._n_texts
        sampler, processors = self._usual
        for i, segment in enumerate(segments):
            parts = [part for part in segment if part]
            if not parts:
                raise ValueError(f"Sequence {i} has an empty prompt: give it at least one token.")
            own = list((logits_processors[i] if logits_processors else None) or processors)
            before = list(all_tokens[i]) if all_tokens else []
            text = Text(
                (samplers[i] if samplers else None) or sampler,
                [p.for_sequence() if hasattr(p, "for_sequence") else p for p in own],
                before + [token for part in parts for token in part],
                self.logprobs,
                beside_others=True,
                limit=max_tokens[i] if max_tokens else self.max_tokens,
                uid=self._n_texts,
            )
            if text.limit <= 0:
                raise ValueError(f"Sequence {i}'s max_tokens is {text.limit}: it must be above 0.")
            self._join(text, parts, caches[i] if caches else None, before)
            self._n_texts += 1
        return list(range(first, self._n_texts))

    def _join(self, text: Text, parts: list[list[int]], cache: Any, before: list[int]) -> None:
        hooks = self._proposer.hooks(text)
        of_text = ([parts], [sys.maxsize], [cache], [before])
        functions = ([hooks["sampler"]], [hooks["logits_processors"]])
        (inner,) = super().insert_segments(*of_text, *functions)
        self._texts[inner] = text

    def next_generated(self) -> list[Any]:
        """The next confirmed tokens; nothing if there are no more texts."""
        with mx.stream(self._stream):
            while self._texts:
                _, responses = self._next()
                if responses:
                    return responses
        return []

    def remove(self, uids: Sequence[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Removes texts. Returns, if asked for, their caches and the tokens given out, in them."""
        texts = {text.uid: text for text in self._texts.values()}
        with mx.stream(self._stream):
            removed = {uid: self._leave(texts[uid]) for uid in uids}
        return removed if return_prompt_caches else {}

    def _next(self) -> tuple[list[Any], list[Any]]:
        self._proposer.texts = [self._texts[n] for n in self._generation_batch.uids] or None
        with self._proposer.in_place():
            prompts, steps = super()._next()
        read = [self._texts[step.uid] for step in steps]
        for text, step in zip(read, steps, strict=True):
            text.read(step.token)
        responses: list[Any] = []
        for text, positions in self._pace.confirmed(list(self._texts.values()), read):
            responses += self._responses(text, positions)
        self._counters.generation_tokens += len(responses) - len(steps)
        for prompt in prompts:
            prompt.uid = self._texts[prompt.uid].uid if prompt.uid in self._texts else prompt.uid
        return prompts, responses

    def _responses(self, text: Text, positions: list[Position]) -> list[Any]:
        responses = []
        for position in positions:
            text.n_given += 1
            end = text.n_given
            reason = "length" if end >= text.limit else None
            if any(text.tokens[max(end - len(stop), 0) : end] == stop for stop in self._stops):
                reason = "stop"
            cache, tokens = (None, None) if reason is None else self._leave(text)
            logprobs = NO_LOGPROBS if position.logprobs is None else position.logprobs
            token = cast(int, position.token)
            responses.append(Response(text.uid, token, logprobs, reason, cache, tokens))
            if reason is not None:
                return responses
        if text.refused:
            cache = self._taken(text, len(text.tokens) - 1)
            self._join(text, [text.tokens[-1:]], cache, text.prompt + text.tokens[:-1])
            text.n_held = len(text.tokens)
        return responses

    def _leave(self, text: Text) -> tuple[list[Any], list[int]]:
        """Ends a text. Returns its cache and the tokens in it, those that the caller has."""
        cache = self._taken(text, text.n_given)
        text.waiting.clear()
        return cache, text.prompt + text.tokens[: text.n_given]

    def _taken(self, text: Text, wanted: int) -> list[Any]:
        """Takes a text out of mlx-lm's batch: its own cache, with ``wanted`` of its tokens."""
        inner = next(inner for inner, other in self._texts.items() if other is text)
        if self._find_uids([inner])[inner][0] != IN_GENERATION:
            text.n_held = max(text.n_held - 1, 0)  # its latest token is still to be fed
        cache = list(super().remove([inner], return_prompt_caches=True)[inner][0])
        del self._texts[inner]

        def feed(token: list[int]) -> None:
            with self._proposer.in_place():
                self.model(mx.array([token], dtype=mx.uint32), cache=cache)
            mx.eval([layer.state for layer in cache])

        if text.mark is not None:  # of the caches of a batch
            mark, row = text.mark
            layers = [None if layer is None else layer.extract(row) for layer in mark.layers]
            go_back(cache, replace(mark, layers=layers), text, wanted, feed)
        return cache

    def _marks(self, texts: Sequence[Text]) -> list[tuple[Mark, int]]:
        """Marks of the batch's caches as they are, with each text's row in them."""
        layers = kept(self._generation_batch.prompt_cache)
        rows = {self._texts[inner]: i for i, inner in enumerate(self._generation_batch.uids)}
        unknown = [None] * len(layers)
        return [(Mark(text.n_held, layers, unknown), rows[text]) for text in texts]
