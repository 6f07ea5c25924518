"""Several sequences at once: mlx-lm's batch, verified. A sequence with a rejected token leaves it
with its caches, rolls back and joins it again."""

import sys
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_lm import ChoosingBatchGenerator, StateMachineStops
from .policy import batch_limit
from .proposer import Proposer, step_arrays
from .sampler import Trust
from .sequence import PendingToken, Sequence, Snapshot, copied_layers, normalized, rollback
from .verify import VerifyScheduler

NO_LOGPROBS = mx.zeros((1,))
N_POSITIONAL = 6  # arguments of ``insert_segments`` after the segments


@dataclass
class Response:
    uid: int
    token: int
    logprobs: mx.array
    finish_reason: str | None
    prompt_cache: list[Any] | None
    all_tokens: list[int] | None


class VerifiedBatchGenerator(ChoosingBatchGenerator):
    """mlx-lm's ``BatchGenerator`` with the choices of the dense model.

    A call of :meth:`next` may give no token of a sequence, or several. A sampler that is given
    here, for all sequences, and draws from MLX's random state is called as mlx-lm calls it, so that
    its texts are decoded densely. Samplers of single sequences draw with a seed of the sequence.

    Args:
        model: A model of mlx-lm, with a FlashHead or without.
        proposer: What proposes the tokens; default: a new one.
        max_tokens: Tokens of a text, at most.
        stop_tokens: Tokens, or sequences of tokens, that end a text.
        sampler: For sequences without one.
        logits_processors: For sequences without any.
        logprobs: Whether log-probabilities are wanted of sequences that are inserted from now on.
        **options: mlx-lm's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        proposer: Proposer | None = None,
        max_tokens: int = 128,
        stop_tokens: Iterable[int | Rows[int]] | None = None,
        sampler: Any = None,
        logits_processors: Any = None,
        logprobs: bool = True,
        **options: Any,
    ):
        super().__init__(model, max_tokens=max_tokens, **options)
        self._proposer = Proposer(model) if proposer is None else proposer
        self._defaults = sampler, logits_processors or []
        # mlx-lm takes single tokens as well
        stops = [[stop] if isinstance(stop, int) else list(stop) for stop in stop_tokens or ()]
        self._stops = [stop for stop in stops if stop]
        self._sequences: dict[int, Sequence] = {}  # by their numbers in mlx-lm's batch
        self._matchers: dict[Sequence, Callable[[int], bool]] = {}
        self._n_sequences = 0
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
    ) -> list[int]:
        """As ``BatchGenerator.insert_segments``. A processor with ``for_sequence`` makes another
        one for each text."""
        first = self._n_sequences
        sampler, processors = self._defaults
        for i, segment in enumerate(segments):
            parts = [part for part in segment if part]
            if not parts:
                raise ValueError(f"Sequence {i} has an empty prompt: give it at least one token.")
            functions = list((logits_processors[i] if logits_processors else None) or processors)
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
            if sequence.limit <= 0:
                raise ValueError(
                    f"Sequence {i}'s max_tokens is {sequence.limit}: it must be above 0."
                )
            if sequence.uses_random_state:  # shared with the others
                sequence.trust = Trust.UNKNOWN
            stop = stop_sequences[i] if stop_sequences else None
            if stop is not None:
                self._matchers[sequence] = stop.matcher().advance
            self._join(sequence, parts, caches[i] if caches else None, before)
            self._n_sequences += 1
        return list(range(first, self._n_sequences))

    def _join(
        self, sequence: Sequence, parts: list[list[int]], cache: Any, before: list[int]
    ) -> None:
        (uid,) = super().insert_segments([parts], [sys.maxsize], [cache], [before])
        self._sequences[uid] = sequence

    def choose(
        self, uids: list[int], latest: mx.array, cache: list[Any]
    ) -> tuple[mx.array, list[mx.array | None]]:
        sequences = [self._sequences[uid] for uid in uids]
        proposer = self._proposer
        with proposer.states() as states:
            logits = self.model(latest[:, None], cache=cache)[:, -1, :]
        verified: list[int] = []
        if proposer.verifies and len(sequences) <= batch_limit(cast(Any, proposer.head)):
            verified = [
                i
                for i, sequence in enumerate(sequences)
                if sequence.snapshot is not None and proposer.can_verify(sequence)
            ]
        if len(verified) == len(sequences):
            tokens, chosen = proposer.propose(sequences, states[-1][:, -1], latest)
            mx.async_eval(step_arrays(tokens, chosen))
            return tokens, [None] * len(sequences)
        dense = [i for i in range(len(sequences)) if i not in set(verified)]
        rows: dict[int, mx.array] = {}
        chosen = []
        if verified:
            index = mx.array(verified)
            of_rows = [sequences[i] for i in verified]
            tokens, chosen = proposer.propose(of_rows, states[-1][:, -1][index], latest[index])
            rows |= {i: tokens[place : place + 1] for place, i in enumerate(verified)}
        by_itself = proposer.head is not None and not proposer.unverified and len(sequences) > 1
        exact = by_itself and logits.dtype != mx.float32
        all_logits = [
            proposer.dense_row(states[-1][i, -1:]) if exact else logits[i : i + 1] for i in dense
        ]
        for i, token in self._choose_densely(dense, sequences, all_logits, latest).items():
            rows[i] = token
            chosen.append(sequences[i].pending[-1])
        tokens = mx.concatenate([rows[i] for i in range(len(sequences))])
        mx.async_eval(step_arrays(tokens, chosen))
        return tokens, [None] * len(sequences)

    def _choose_densely(
        self, rows: list[int], sequences: list[Sequence], logits: list[mx.array], latest: mx.array
    ) -> dict[int, mx.array]:
        """The tokens (1,) of some rows, by the normal logits (1, V) of each."""
        processed: list[mx.array] = []
        for i, row in zip(rows, logits, strict=True):
            sequence = sequences[i]
            context = None
            if sequence.processors:
                known = max(sequence.n_chosen - 1, 0)
                context = sequence.context(known, latest[i : i + 1] if sequence.n_chosen else None)
            processed.append(sequence.process(row, context))
        samplers = {id(sequences[i].sampler) for i in rows}
        shared = len(rows) == len(sequences) and len(samplers) == 1
        if shared and sequences[0].uses_random_state:  # called once, as mlx-lm does
            logprobs = normalized(mx.concatenate(processed))
            sampled = cast(Any, sequences[0].sampler)(logprobs)
            tokens = [sampled[i : i + 1] for i in range(len(rows))]
            of_rows = [logprobs[i : i + 1] for i in range(len(rows))]
        else:
            of_rows = [normalized(row) for row in processed]
            tokens = [
                sequences[i].pick(row, logprobs, sequences[i].n_chosen)
                for i, row, logprobs in zip(rows, processed, of_rows, strict=True)
            ]
        for i, logprobs in zip(rows, of_rows, strict=True):
            wanted = logprobs[0] if sequences[i].logprobs else None
            sequences[i].pending.append(PendingToken(logprobs=wanted))
        return dict(zip(rows, tokens, strict=True))

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
        return removed if return_prompt_caches else {}

    def extract_cache(self, uids: Rows[int]) -> dict[int, Any]:
        """Copies of the caches of some sequences, with the tokens in them."""
        inner = {sequence.uid: uid for uid, sequence in self._sequences.items()}
        caches: dict[int, Any] = {}
        with mx.stream(self._stream):
            for uid in uids:
                sequence = self._sequences[inner[uid]]
                cache, tokens = self.caches_of(inner[uid])
                if self.is_generating(inner[uid]):
                    cache = self._rolled_back(
                        cache, sequence, sequence.n_cached, sequence.n_yielded
                    )
                    tokens = sequence.prompt + sequence.tokens[: sequence.n_yielded]
                caches[uid] = (cache, tokens)
        return caches

    def _next(self) -> tuple[list[Any], list[Any]]:
        prompts, steps = self.advance()
        read = [self._sequences[step.uid] for step in steps]
        for sequence, step in zip(read, steps, strict=True):
            sequence.pending[sequence.n_read].read(step.token)
            sequence.n_cached = len(sequence.tokens) + sequence.n_read
        responses: list[Any] = []
        for sequence, accepted in self._scheduler.step(list(self._sequences.values()), read):
            responses += self._responses(sequence, accepted)
        self.count(len(responses) - len(steps))
        for prompt in prompts:
            if prompt.uid in self._sequences:
                prompt.uid = self._sequences[prompt.uid].uid
        return prompts, responses

    def _responses(self, sequence: Sequence, accepted: list[PendingToken]) -> list[Any]:
        responses = []
        for pending in accepted:
            sequence.n_yielded += 1
            end, token = sequence.n_yielded, cast(int, pending.token)
            reason = "length" if end >= sequence.limit else None
            if self._stops_at(sequence, token):
                reason = "stop"
            cache, tokens = (None, None) if reason is None else self._leave(sequence)
            logprobs = NO_LOGPROBS if pending.logprobs is None else pending.logprobs
            responses.append(Response(sequence.uid, token, logprobs, reason, cache, tokens))
            if reason is not None:
                return responses
        if sequence.rejected:
            target = len(sequence.tokens) - 1
            cache = self._take_out(sequence, target)
            before = sequence.prompt + sequence.tokens[:-1]
            self._join(sequence, [sequence.tokens[-1:]], cache, before)
            sequence.n_cached = len(sequence.tokens)
        return responses

    def _stops_at(self, sequence: Sequence, token: int) -> bool:
        if sequence in self._matchers:
            return self._matchers[sequence](token)
        end = sequence.n_yielded
        return any(sequence.tokens[max(end - len(stop), 0) : end] == stop for stop in self._stops)

    def _leave(self, sequence: Sequence) -> tuple[list[Any], list[int]]:
        """Ends a sequence. Returns its caches and the tokens in them, those handed out."""
        cache = self._take_out(sequence, sequence.n_yielded)
        sequence.pending.clear()
        self._matchers.pop(sequence, None)
        return cache, sequence.prompt + sequence.tokens[: sequence.n_yielded]

    def _take_out(self, sequence: Sequence, target: int) -> list[Any]:
        """Takes a sequence out of mlx-lm's batch: its caches, with ``target`` of its tokens."""
        uid = next(uid for uid, other in self._sequences.items() if other is sequence)
        n_cached = sequence.n_cached
        if not self.is_generating(uid):
            n_cached = max(n_cached - 1, 0)  # its latest token is still to be fed
        cache = self._rolled_back(self.caches_of(uid)[0], sequence, n_cached, target)
        self.drop(uid)
        del self._sequences[uid]
        sequence.n_cached, sequence.rejected = target, False
        return cache

    def _rolled_back(
        self, cache: list[Any], sequence: Sequence, n_cached: int, target: int
    ) -> list[Any]:
        if sequence.snapshot is None:
            return cache

        def replay(token: list[int]) -> None:
            self.model(mx.array([token], dtype=mx.uint32), cache=cache)
            mx.eval([layer.state for layer in cache])

        snapshot, row = sequence.snapshot  # of the caches of a batch
        layers = [None if layer is None else layer.extract(row) for layer in snapshot.layers]
        n_right = min(n_cached, len(sequence.tokens) - sequence.rejected)
        rollback(
            cache,
            replace(snapshot, layers=layers),
            sequence.tokens,
            n_cached=n_cached,
            n_right=n_right,
            target=target,
            replay=replay,
        )
        return cache

    def _snapshots(self, sequences: list[Sequence]) -> list[tuple[Snapshot, int]]:
        """Snapshots of the batch's caches as they are, with each sequence's row in them."""
        layers = copied_layers(self.generation_cache)
        rows = {self._sequences[uid]: i for i, uid in enumerate(self.generating)}
        unknown: list[int | None] = [None] * len(layers)
        return [(Snapshot(s.n_cached, layers, unknown), rows[s]) for s in sequences]


class HostedBatchGenerator(VerifiedBatchGenerator):
    """The same for another program. It may give the state machines of mlx-lm 0.31, and read the
    ``current_state`` and ``match_sequence`` of each response."""

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        *arguments: Any,
        state_machines: list[Any] | None = None,
        **options: Any,
    ) -> list[int]:
        if len(arguments) == N_POSITIONAL:
            *arguments, state_machines = arguments  # type: ignore[assignment]
        stops = [
            StateMachineStops(stop) if hasattr(stop, "make_state") else stop
            for stop in state_machines or ()
        ]
        if stops:
            options["stop_sequences"] = stops
        return super().insert_segments(segments, *arguments, **options)

    def _responses(self, sequence: Sequence, accepted: list[PendingToken]) -> list[Any]:
        self._states: list[tuple[Any, Any]] = []
        responses = super()._responses(sequence, accepted)
        for response, (match, state) in zip(responses, self._states, strict=True):
            response.match_sequence, response.current_state = match, state
        return responses

    def _stops_at(self, sequence: Sequence, token: int) -> bool:
        stops = super()._stops_at(sequence, token)
        follower = getattr(self._matchers.get(sequence), "__self__", None)
        names = ("match_sequence", "current_state")
        match, state = (getattr(follower, name, None) for name in names)
        self._states.append((match, state))
        return stops
