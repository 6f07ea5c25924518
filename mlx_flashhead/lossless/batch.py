"""Texts that are generated together: mlx-lm's batch, with the check over all of its rows.

The batch computes proposals. A check takes the waiting positions of all texts at once. A text for
which it makes another choice leaves the batch with its own cache, goes back, and joins it again.
The others lose the time alone.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.generate import BatchGenerator, GenerationBatch, StopSequences
from .check import Check
from .loop import MOST_READ
from .pace import Pace
from .proposals import Proposer
from .text import Position, Text
from .way_back import Mark, go_back, trims

Response = GenerationBatch.Response
NO_LOGPROBS = mx.zeros((1,))
IN_GENERATION = 2  # the stage of a text in mlx-lm's batch


@dataclass(eq=False)
class _Sequence:
    """A text in the batch.

    Attributes:
        uid: Its number for the caller.
        text: The text.
        max_tokens: Its limit.
        stops: How far its latest tokens match sequences that end it.
        inner: Its number in mlx-lm's batch.
        n_given: Tokens that the caller has.
        n_held: Tokens of the text in the batch's cache.
        mark: The caches at a confirmed token.
        checked: The same, if the check confirms.
    """

    uid: int
    text: Text
    max_tokens: int
    stops: Any
    inner: int = -1
    n_given: int = 0
    n_held: int = 0
    mark: "_BatchMark | None" = None
    checked: "_BatchMark | None" = None

    @property
    def all_tokens(self) -> list[int]:
        """The prompt and the tokens that the caller has."""
        return self.text.prompt + self.text.tokens[: self.n_given]


@dataclass(frozen=True)
class _BatchMark:
    """Caches of a batch as of one token of a text, and its row in those that are copies."""

    n_tokens: int
    layers: Sequence[Any]
    row: int

    def own(self) -> Mark:
        """The mark of the text's own caches."""
        layers = [None if layer is None else layer.extract(self.row) for layer in self.layers]
        return Mark(self.n_tokens, layers, [None] * len(layers))


class CheckedBatchGenerator(BatchGenerator):
    """mlx-lm's ``BatchGenerator`` with the choices of the dense model.

    A call of :meth:`next` may give no token of a text, or several.

    Args:
        model: The model.
        proposer: Chooses the tokens.
        max_tokens: Of a text without a limit of its own.
        stop_tokens: Sequences of tokens that end a text.
        sampler: Of texts without one of their own.
        logits_processors: Likewise.
        logprobs: Whether the log-probabilities of texts are wanted that are inserted from now on.
        **options: More of ``BatchGenerator``.
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
        self._stops = StopSequences(stop_tokens or None)
        self._sequences: dict[int, _Sequence] = {}
        self._inner: dict[int, _Sequence] = {}
        self._n_sequences = 0
        self._pace = Pace(proposer.most_waiting, timed=not proposer.in_step)
        self._check: Check | None = None
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
        """As ``BatchGenerator.insert_segments``: each text has a sampler and processors of its own.

        A processor with ``for_sequence`` makes another one for each text.
        """
        uids = []
        sampler, processors = self._usual
        for i, parts in enumerate(segments):
            own = list((logits_processors[i] if logits_processors else None) or processors)
            own = [p.for_sequence() if hasattr(p, "for_sequence") else p for p in own]
            before = list(all_tokens[i]) if all_tokens else []
            text = Text(
                (samplers[i] if samplers else None) or sampler,
                own,
                before + [token for part in parts for token in part],
                self.logprobs,
                beside_others=True,
            )
            limit = max_tokens[i] if max_tokens else self.max_tokens
            if limit <= 0:
                raise ValueError(f"Sequence {i}'s max_tokens is {limit}: it must be above 0.")
            stops = (stop_sequences[i] if stop_sequences else None) or self._stops
            sequence = _Sequence(self._n_sequences, text, limit, stops.matcher())
            self._join(sequence, parts, caches[i] if caches else None, before)
            self._sequences[sequence.uid] = sequence
            self._n_sequences += 1
            uids.append(sequence.uid)
        return uids

    def _join(
        self, sequence: _Sequence, parts: list[list[int]], cache: Any, before: list[int]
    ) -> None:
        hooks = self._proposer.hooks(sequence.text)
        (sequence.inner,) = super().insert_segments(
            [parts],
            [sys.maxsize],
            [cache],
            [list(before)],
            [hooks["sampler"]],
            [hooks["logits_processors"]],
        )
        self._inner[sequence.inner] = sequence

    def next_generated(self) -> list[Any]:
        """The next confirmed tokens; nothing if there are no more texts."""
        with mx.stream(self._stream):
            while self._sequences:
                _, responses = self._next()
                if responses:
                    return responses
        return []

    def remove(self, uids: Sequence[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Removes texts. Their caches hold the confirmed tokens that were given out.

        Returns:
            For each text, its cache and the tokens in it, if they are asked for.
        """
        removed = {}
        with mx.stream(self._stream):
            for uid in uids:
                sequence = self._sequences[uid]
                if return_prompt_caches:
                    removed[uid] = (self._leave(sequence, sequence.n_given), sequence.all_tokens)
                else:
                    super().remove([sequence.inner])
                self._forget(sequence)
        return removed

    def _next(self) -> tuple[list[Any], list[Any]]:
        uids = self._generation_batch.uids
        self._proposer.texts = [self._inner[uid].text for uid in uids] or None
        with self._proposer.in_place():
            prompts, steps = super()._next()
        for step in steps:
            sequence = self._inner[step.uid]
            sequence.text.read(step.token)
            sequence.n_held = len(sequence.text.tokens) + sequence.text.n_read
        responses: list[Any] = []
        if self._check is not None and (self._check.ready or self._n_waiting >= MOST_READ):
            responses += self._outcome()
        last = False
        for step in steps:
            waiting = self._inner.get(step.uid)  # a text that has ended or gone back is not there
            if waiting is not None:
                last = self._wait(waiting, responses) or last
        if last and self._check is not None:
            responses += self._outcome()
        if self._check is None and (last or self._pace.due):
            self._launch()
            if last:
                responses += self._outcome()
        self._counters.generation_tokens += len(responses) - len(steps)
        for prompt in prompts:
            prompt.uid = self._inner[prompt.uid].uid if prompt.uid in self._inner else prompt.uid
        return prompts, responses

    def _wait(self, sequence: _Sequence, responses: list[Any]) -> bool:
        """Lets the latest token wait, or gives it out if it is sure. Returns whether it is last."""
        text = sequence.text
        if not text.n_read:
            return False
        position = text.waiting[text.n_read - 1]
        if not self._proposer.check or (position.dense and text.n_read == 1):
            given = [text.confirm() for _ in range(text.n_read)]
            if self._proposer.check:
                (sequence.mark,) = self._marks([sequence])
            responses += self._responses(sequence, given)
            return False
        self._pace.wait(position.risk)
        length = len(text.tokens) + text.n_read
        return position.token in self._proposer.ends or length == sequence.max_tokens

    @property
    def _n_waiting(self) -> int:
        """The most positions of a text that wait."""
        return max((s.text.n_read for s in self._inner.values()), default=0)

    def _launch(self) -> None:
        waiting = [s for s in self._inner.values() if s.text.n_read]
        self._check = Check(self._proposer, [(s.text, s.text.n_read) for s in waiting])
        for sequence, marked in zip(waiting, self._marks(waiting), strict=True):
            sequence.checked = marked
        self._pace.checked()

    def _outcome(self) -> list[Any]:
        """Gives out what the check confirms. A text with another choice goes back."""
        check, self._check = self._check, None
        assert check is not None
        responses: list[Any] = []
        for sequence in list(self._inner.values()):
            if sequence.text not in check.texts:
                continue
            confirmed, other = check.confirm(sequence.text)
            if not other:
                sequence.mark = sequence.checked
            responses += self._responses(sequence, confirmed, goes_back=other)
        return responses

    def _responses(
        self, sequence: _Sequence, positions: list[Position], goes_back: bool = False
    ) -> list[Any]:
        """The responses for confirmed positions, up to the text's end."""
        responses = []
        for position in positions:
            sequence.n_given += 1
            reason = "length" if sequence.n_given >= sequence.max_tokens else None
            if sequence.stops.advance(position.token):
                reason = "stop"
            cache, tokens = None, None
            if reason is not None:
                refused = goes_back and sequence.n_given == len(sequence.text.tokens)
                cache = self._leave(sequence, sequence.n_given, refused)
                tokens = sequence.all_tokens
                self._forget(sequence)
            logprobs = NO_LOGPROBS if position.logprobs is None else position.logprobs
            token = cast(int, position.token)
            responses.append(Response(sequence.uid, token, logprobs, reason, cache, tokens))
            if reason is not None:
                return responses
        if goes_back:
            text = sequence.text
            cache = self._leave(sequence, len(text.tokens) - 1)
            del self._inner[sequence.inner]
            self._join(sequence, [text.tokens[-1:]], cache, text.prompt + text.tokens[:-1])
            sequence.n_held = len(text.tokens)
        return responses

    def _leave(self, sequence: _Sequence, wanted: int, refused: bool = False) -> list[Any]:
        """Takes a text out of mlx-lm's batch: its own cache, with ``wanted`` of its tokens.

        ``refused`` says that the batch's cache holds a proposal in the last one's place.
        """
        if self._find_uids([sequence.inner])[sequence.inner][0] != IN_GENERATION:
            sequence.n_held = max(sequence.n_held - 1, 0)  # its latest token is still to be fed
        held = super().remove([sequence.inner], return_prompt_caches=True)[sequence.inner]
        cache = list(held[0])
        if sequence.mark is None:
            return cache
        tokens, marked, n_held = sequence.text.tokens, sequence.mark.own(), sequence.n_held

        def feed(place: int) -> None:
            with self._proposer.in_place():
                self.model(mx.array([tokens[place : place + 1]], dtype=mx.uint32), cache=cache)
            mx.eval([layer.state for layer in cache])

        for n_tokens in (wanted - 1, wanted) if refused else (wanted,):
            if n_held != n_tokens:
                go_back(cache, marked, n_held, n_tokens, feed)
                n_held = n_tokens
        return cache

    def _forget(self, sequence: _Sequence) -> None:
        self._inner.pop(sequence.inner, None)
        self._sequences.pop(sequence.uid, None)

    def _marks(self, sequences: Sequence[_Sequence]) -> list[_BatchMark]:
        """Marks of the caches as they are."""
        layers = [
            None if trims(layer, None) else copy.deepcopy(layer)
            for layer in self._generation_batch.prompt_cache
        ]
        rows = {uid: row for row, uid in enumerate(self._generation_batch.uids)}
        return [_BatchMark(s.n_held, layers, rows[s.inner]) for s in sequences]
