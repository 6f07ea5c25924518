"""When pending tokens are verified, and what is sure then."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from .policy import Proposer
from .sequence import PendingToken, Sequence
from .verification import Verification, join

MAX_READ = 64  # tokens that may be read while a verification is computed
JOINED = 7  # pending tokens that are joined at a time; a kernel joins 8 at the launch
FEW = 4  # tokens that may wait longer, on a machine that is slow to compute them


class VerifyScheduler:
    """Has the pending tokens of some sequences verified, and hands out what is sure. The first
    verifications come after few tokens, so that text begins to flow early. ``snapshot`` takes
    snapshots of the caches of some sequences as they are."""

    def __init__(self, proposer: Proposer, snapshot: Callable[[list[Sequence]], list[Any]]):
        self._proposer, self._snapshot = proposer, snapshot
        self._verification: Verification | None = None
        self._limit = proposer.policy.first_pending
        self._n, self._risk, self._since = 0, 0.0, 0.0  # of the tokens that wait for a launch
        self._unjoined: list[PendingToken] = []
        self.joined: list[mx.array] = []  # of these, to be computed with the next step

    def step(
        self, sequences: list[Sequence], read: list[Sequence]
    ) -> Iterator[tuple[Sequence, list[PendingToken]]]:
        """After a step, which has read a token of the sequences in ``read``: what is sure now. The
        caller rolls back rejected sequences and drops finished ones."""
        self.joined, verification = [], self._verification
        n_read = max((sequence.n_read for sequence in sequences), default=0)
        if verification is not None and (verification.ready or n_read >= MAX_READ):
            yield from self._outcome()
        ends = False
        for sequence in read:
            if not sequence.n_read:  # it has ended or was rolled back
                continue
            pending = sequence.pending[sequence.n_read - 1]
            if pending.proposal is None and sequence.n_read == 1:
                accepted = [sequence.accept()]
                if self._proposer.can_verify(sequence):
                    (sequence.snapshot,) = self._snapshot([sequence])
                yield sequence, accepted
                continue
            self._since = self._since if self._n else time.perf_counter()
            self._n, self._risk = self._n + 1, self._risk + pending.risk
            self._unjoined += [pending] * (pending.proposal is not None)
            ends |= pending.token in self._proposer.head.eos_token_ids
            ends |= len(sequence.tokens) + sequence.n_read == sequence.limit
        if ends and self._verification is not None:
            yield from self._outcome()
        waiting = [sequence for sequence in sequences if sequence.n_read]
        if waiting and self._verification is None and (ends or self._due):
            self._n, self._risk, self._limit = 0, 0.0, self._limit * 2
            self._unjoined = []
            self._verification = Verification(self._proposer, waiting, self._snapshot(waiting))
            if ends:  # waits, since the next step may be of no use
                yield from self._outcome()
        elif len(self._unjoined) >= JOINED:
            proposal, self._unjoined = join(self._proposer.head, self._unjoined), []
            self.joined = [proposal.hidden, proposal.probes, proposal.logits]

    @property
    def _due(self) -> bool:
        policy, max_wait = self._proposer.policy, self._proposer.max_wait
        few, seconds = (FEW, policy.max_wait) if max_wait is None else (1, max_wait)
        too_long = self._n >= few and time.perf_counter() - self._since >= seconds
        too_many = self._n >= min(self._limit, policy.max_pending)
        return too_many or self._risk >= policy.max_risk or (too_long and not policy.lockstep)

    def _outcome(self) -> Iterator[tuple[Sequence, list[PendingToken]]]:
        """Waits for the verification. A sequence that goes on has a snapshot of its launch."""
        verification, self._verification = self._verification, None
        assert verification is not None
        for sequence, snapshot in verification.snapshots.items():
            if sequence.pending:  # else it has ended meanwhile
                accepted = verification.accept(sequence)
                if not sequence.rejected:
                    sequence.snapshot = snapshot
                yield sequence, accepted
