"""Several sequences at once: mlx-lm's batch, verified. A sequence with a rejected token leaves it
with its caches, rolls back and joins it again."""

import sys
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head.draw import draw_all
from ..models.compat.mlx_lm import ChoosingBatchGenerator, StateMachineStops
from .caches import Snapshot, copied_layers, rollback
from .policy import Proposer, step_arrays
from .sampler import Trust, normalized
from .schedule import VerifyScheduler
from .sequence import PendingToken, Sequence

NO_LOGPROBS = mx.array([0.0])  # evaluated: a lazy one would belong to the importing thread


@dataclass
class Response:
    uid: int
    token: int
    logprobs: mx.array
    finish_reason: str | None
    prompt_cache: list[Any] | None
    all_tokens: list[int] | None
    match_sequence: Any  # of a state machine of mlx-lm 0.31
    current_state: Any


class VerifiedBatchGenerator(ChoosingBatchGenerator):
    """mlx-lm's ``BatchGenerator`` with the choices of the dense model.

    A call of :meth:`next` may return no token of a sequence, or several. Texts of a sampler for all
    sequences that draws from MLX's random state are decoded densely. Samplers of single sequences
    draw with a seed of the sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        proposer: Proposer | None = None,  # None: a new one
        max_tokens: int = 128,  # of a text
        stop_tokens: Iterable[int | Rows[int]] | None = None,  # tokens, or sequences, that end it
        sampler: Any = None,  # for sequences without one
        logits_processors: Any = None,  # for sequences without any
        logprobs: bool = True,  # whether sequences inserted from now on need log-probabilities
        **options: Any,
    ):
        super().__init__(model, max_tokens=max_tokens, **options)
        self._proposer = Proposer(model) if proposer is None else proposer
        self._defaults = sampler, logits_processors or []
        # mlx-lm takes single tokens as well
        stops = [[stop] if isinstance(stop, int) else list(stop) for stop in stop_tokens or ()]
        self._stops = [stop for stop in stops if stop]
        self._sequences: dict[int, Sequence] = {}  # by their numbers in mlx-lm's batch
        self._matchers: dict[Sequence, Any] = {}  # of those with stops of their own
        self._n_sequences = 0
        self._to_drop: list[int] = []  # out of mlx-lm's batch, which copies its caches to do so
        self._scheduler = VerifyScheduler(self._proposer, self._snapshots)
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
        state_machines: list[Any] | None = None,
    ) -> list[int]:
        """As ``BatchGenerator.insert_segments``. A processor with ``for_sequence`` makes another
        one for each text. ``state_machines`` are 0.31's ``stop_sequences``."""
        first = self._n_sequences
        sampler, processors = self._defaults
        stops = stop_sequences or state_machines
        for i, segment in enumerate(segments):
            parts = [part for part in segment if part]
            if not parts:
                raise ValueError(f"Sequence {i} has an empty prompt: give it at least one token.")
            functions = (logits_processors[i] if logits_processors else None) or processors
            before = list(all_tokens[i]) if all_tokens else []
            own = samplers[i] if samplers else None
            sequence = Sequence(
                sampler if own is None else own,
                [p.for_sequence() if hasattr(p, "for_sequence") else p for p in functions],
                before + [token for part in parts for token in part],
                logprobs=self.logprobs,
                batched=own is not None,
                limit=max_tokens[i] if max_tokens else self.max_tokens,
                uid=self._n_sequences,
            )
            if (limit := sequence.limit) <= 0:
                raise ValueError(f"Sequence {i}'s max_tokens is {limit}: it must be above 0.")
            if sequence.uses_random_state:  # shared with the others
                sequence.trust = Trust.UNKNOWN
            if stops and stops[i] is not None:
                of_0_31 = hasattr(stops[i], "make_state")
                stop = StateMachineStops(stops[i]) if of_0_31 else stops[i]
                self._matchers[sequence] = stop.matcher()
            self._join(sequence, parts, caches[i] if caches else None, before)
            self._n_sequences += 1
        return list(range(first, self._n_sequences))

    def _join(self, sequence: Sequence, parts: list[Any], cache: Any, before: list[int]) -> None:
        (uid,) = super().insert_segments([parts], [sys.maxsize], [cache], [before])
        self._sequences[uid] = sequence

    def choose(
        self, uids: list[int], latest: mx.array, cache: list[Any]
    ) -> tuple[mx.array, list[mx.array | None]]:
        sequences = [self._sequences[uid] for uid in uids]
        proposer, n = self._proposer, len(sequences)
        with proposer.states() as states:
            logits = self.model(latest[:, None], cache=cache)[:, -1, :]
        proposes = proposer.verifies and n <= proposer.max_batch
        known = [proposes and proposer.can_verify(sequence) for sequence in sequences]
        verified = [i for i in range(n) if known[i] and sequences[i].snapshot is not None]
        tokens, chosen = latest, list[PendingToken]()
        if verified:
            rows: Any = slice(None) if len(verified) == n else mx.array(verified)
            tokens, chosen = proposer.propose(
                [sequences[i] for i in verified], states[-1][:, -1][rows], latest[rows]
            )
        if dense := [i for i in range(n) if i not in verified]:
            # in 16 bits, where a product of several states rounds otherwise than a verification
            by_itself = [n > 1 and logits.dtype != mx.float32 and each for each in known]
            dense_logits = [
                proposer.dense_row(states[-1][i, -1:]) if by_itself[i] else logits[i : i + 1]
                for i in dense
            ]
            sampled = self._choose_densely(dense, sequences, dense_logits, latest)
            chosen += [sequences[i].pending[-1] for i in dense]
            places = mx.argsort(mx.array(verified + dense))
            tokens = mx.concatenate([tokens, sampled])[places] if verified else sampled
        mx.async_eval(step_arrays(tokens, chosen), self._scheduler.joined)
        return tokens, [None] * n

    def _choose_densely(
        self, rows: list[int], sequences: list[Sequence], logits: list[mx.array], latest: mx.array
    ) -> mx.array:
        """The tokens (R,) of some rows, by the normal logits (1, V) of each."""
        chosen = [sequences[i] for i in rows]
        latest_ids = [latest[i : i + 1] if sequences[i].n_chosen else None for i in rows]
        cases = list(zip(chosen, logits, latest_ids, strict=True))
        shared = len(rows) == len(sequences) and all(s.sampler is chosen[0].sampler for s in chosen)
        if shared and chosen[0].uses_random_state:
            each = [s.process(row, s.context(s.n_chosen, last)) for s, row, last in cases]
            logprobs = normalized(mx.concatenate(each))
            sampled = cast(Any, chosen[0].sampler)(logprobs)  # called once, as mlx-lm does
        elif any(s.needs_logits or s.greedy for s in chosen):
            return mx.concatenate([s.extend(row, last) for s, row, last in cases])
        else:
            together = mx.concatenate(logits)  # one draw, in a fraction of the operations
            logprobs = normalized(together)
            sampled = draw_all(together, [s.draw_at(s.n_chosen) for s in chosen])
        for sequence, row in zip(chosen, logprobs, strict=True):
            sequence.pending.append(PendingToken(logprobs=row if sequence.logprobs else None))
        return sampled

    def next_generated(self) -> list[Any]:
        """The next accepted tokens; nothing if there are no more sequences."""
        with mx.stream(self._stream):
            while self._sequences:
                _, responses = self._next()
                if responses:
                    return responses
        return []

    def remove(self, uids: Rows[int], return_prompt_caches: bool = False) -> dict[int, Any]:
        """Removes sequences. Returns, where wanted, their caches and the tokens in them, those that
        were handed out."""
        known = {sequence.uid: sequence for sequence in self._sequences.values()}
        with mx.stream(self._stream):
            removed = {uid: self._leave(known[uid]) for uid in uids}
            self._drop_all()
        return removed if return_prompt_caches else {}

    def extract_cache(self, uids: Rows[int]) -> dict[int, Any]:
        """Copies of the caches of some sequences, with the tokens in them."""
        wanted = [(uid, s) for uid, s in self._sequences.items() if s.uid in uids]
        caches: dict[int, Any] = {}
        with mx.stream(self._stream):
            for uid, sequence in wanted:
                caches[sequence.uid] = super().extract_cache([uid])[uid]
                if uid in self.generating:
                    target = sequence.n_yielded
                    cache = self._rolled_back(uid, sequence.n_cached, target)
                    caches[sequence.uid] = cache, sequence.prompt + sequence.tokens[:target]
        return caches

    def _next(self) -> tuple[list[Any], list[Any]]:
        prompts, steps = self.advance()
        read = [self._sequences[step.uid] for step in steps]
        for sequence, step in zip(read, steps, strict=True):
            sequence.pending[sequence.n_read].read(step.token)
            sequence.n_cached = len(sequence.tokens) + sequence.n_read
        responses: list[Any] = []
        try:
            for sequence, accepted in self._scheduler.step([*self._sequences.values()], read):
                responses += self._responses(sequence, accepted)
        finally:
            self._drop_all()
        self.count(len(responses) - len(steps))
        for prompt in prompts:
            if prompt.uid in self._sequences:
                prompt.uid = self._sequences[prompt.uid].uid
        return prompts, responses

    def _responses(self, sequence: Sequence, accepted: list[PendingToken]) -> list[Any]:
        responses: list[Any] = []
        matcher = self._matchers.get(sequence)
        for pending in accepted:
            sequence.n_yielded += 1
            end, token = sequence.n_yielded, cast(int, pending.token)
            if matcher is not None:
                stops = matcher.advance(token)
            else:
                tokens = sequence.tokens
                stops = any(tokens[max(end - len(s), 0) : end] == s for s in self._stops)
            reason = "stop" if stops else "length" if end >= sequence.limit else None
            logprobs = NO_LOGPROBS if pending.logprobs is None else pending.logprobs
            ended = (None, None) if reason is None else self._leave(sequence)
            states = [getattr(matcher, name, None) for name in ("match_sequence", "current_state")]
            responses.append(Response(sequence.uid, token, logprobs, reason, *ended, *states))
            if reason is not None:
                return responses
        if sequence.rejected:
            cache = self._take_out(sequence, len(sequence.tokens) - 1)
            before = sequence.prompt + sequence.tokens[:-1]
            self._join(sequence, [sequence.tokens[-1:]], cache, before)
            sequence.n_cached = len(sequence.tokens)
        return responses

    def _leave(self, sequence: Sequence) -> tuple[list[Any], list[int]]:
        """Ends a sequence. Returns its caches and the tokens in them, those handed out."""
        tokens = sequence.prompt + sequence.tokens[: sequence.n_yielded]
        if not (sequence.tokens or sequence.pending):  # nor is the prompt's last token in them yet
            tokens = tokens[:-1]
        cache = self._take_out(sequence, sequence.n_yielded)
        sequence.pending.clear()
        self._matchers.pop(sequence, None)
        return cache, tokens

    def _take_out(self, sequence: Sequence, target: int) -> list[Any]:
        """Takes a sequence out of mlx-lm's batch: its caches, with ``target`` of its tokens."""
        uid = next(uid for uid, other in self._sequences.items() if other is sequence)
        n_cached = sequence.n_cached
        if uid not in self.generating:
            n_cached = max(n_cached - 1, 0)  # its latest token is still to be fed
        cache = self._rolled_back(uid, n_cached, target)
        self._to_drop.append(uid)
        del self._sequences[uid]
        sequence.n_cached, sequence.rejected = target, False
        return cache

    def _drop_all(self) -> None:
        if self._to_drop:
            super().remove(self._to_drop)
            self._to_drop.clear()

    def _rolled_back(self, uid: int, n_cached: int, target: int) -> list[Any]:
        """A sequence's own caches, with ``target`` tokens of its text instead of ``n_cached``."""
        cache = list(super().extract_cache([uid])[uid][0])
        feed = partial(self.model, cache=cache)
        rollback(cache, self._sequences[uid], n_cached, target, feed)
        return cache

    def _snapshots(self, sequences: list[Sequence]) -> list[Snapshot]:
        """Snapshots of the batch's caches as they are, with each sequence's row in them."""
        layers = copied_layers(self.generation_cache)
        rows = {self._sequences.get(uid): i for i, uid in enumerate(self.generating)}
        unknown: list[int | None] = [None] * len(layers)
        return [Snapshot(s.n_cached, layers, unknown, rows[s]) for s in sequences]
