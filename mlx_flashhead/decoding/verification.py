"""Verification multiplies the dense rows with all pending states at once.

It finds which proposals are certain whatever rounding does.
"""

from typing import Any, cast

import mlx.core as mx

from ..head.clustered import in_token_order
from ..head.draws.rows import Draws
from ..head.flash_head import FlashHead
from ..head.logit_map import LogitMap
from ..head.proposal import Proposal, Screen
from .changes import after_changes, mask_array
from .proposer import Proposer
from .rounding import SlotProduct, rounding_of
from .sampler import normalized
from .sequence import PendingToken, Sequence

Row = tuple[Sequence, PendingToken, int]  # a sequence, its pending token, its place in the text


class Verification:
    """A verification of the pending tokens that are read.

    It is launched when made, and read by :meth:`accept`. ``snapshots`` are the caches of the
    ``sequences`` as they are now.
    """

    def __init__(self, proposer: Proposer, sequences: list[Sequence], snapshots: list[Any]):
        self._proposer = proposer
        self._head = proposer.head
        self.snapshots = dict(zip(sequences, snapshots, strict=True))
        self.counts = {sequence: sequence.n_read for sequence in sequences}
        rows: list[Row] = [
            (sequence, sequence.pending[i], len(sequence.tokens) + i)
            for sequence, n in self.counts.items()
            for i in range(n)
            if sequence.pending[i].proposal is not None
        ]
        self._rows = rows
        self._product: SlotProduct | None = None
        self._certain: mx.array | None = None  # whether each row's token is the dense choice, lazy
        self._choices: dict[PendingToken, tuple[int, mx.array | None]] = {}  # of rows in doubt
        if rows:
            proposer.n_verifications += 1
            tokens = [pending for _, pending, _ in self._rows]
            sources = [(cast(Proposal, each.proposal).hidden, each.row) for each in tokens]
            self._proposal = join(self._head, tokens)
            hidden = self._proposal.hidden
            self._rounding = rounding_of(self._head, hidden.dtype, len(hidden))
            self._product = SlotProduct(self._head, hidden, sources)
            if self._product.ready:
                self._screen()

    @property
    def ready(self) -> bool:
        """Whether it is time to :meth:`accept`: no thread is at work, or it is waited for."""
        return self._product is None or self._product.ready or self._proposer.policy.lockstep

    def _screen(self) -> None:
        """Judges the rows by the product, as soon as it is there."""
        slots = cast(SlotProduct, self._product).result()
        self._product = None
        rows = self._rows
        draws = Draws.of([sequence.draw_at(index) for sequence, _, index in rows])
        tolerance = self._rounding.tolerance(self._proposal.hidden, self._head.steps)
        epsilon = self._rounding.epsilon
        if self._rounding.scored:
            changes = [sequence.changes for sequence, *_ in rows]
            scored = after_changes(tolerance.scored, self._proposal.logits, changes, epsilon)
            tolerance = tolerance._replace(scored=scored)
        screen: Screen = self._head.steps.screen(
            slots,
            self._proposal,
            draws,
            tolerance,
            epsilon,
            cast(LogitMap, self._proposer.logit_map),
            mask_array([pending.allowed for _, pending, _ in rows]),
        )
        self._certain = screen.certain
        for i, (sequence, pending, index) in enumerate(rows):
            if sequence.logprobs:  # lazy, since few are read
                logits = in_token_order(slots[i : i + 1].flatten(1), self._head.clustered.slot_of)
                logits = self._proposer.model_logits(logits)  # (1, V), as the model gives them
                logits = sequence.process(logits, sequence.context(index))
                pending.logprobs = normalized(logits)[0]
        mx.async_eval(self._certain)

    def forget(self, sequences: list[Sequence]) -> None:
        """Drops what was launched for some sequences."""
        for sequence in sequences:
            self.snapshots.pop(sequence, None)

    def accept(self, sequence: Sequence) -> None:
        """Waits for the verification and accepts the sequence's tokens up to a rejected one.

        The dense choice takes its place, and nothing is pending any more.
        """
        if self._product is not None:
            self._screen()
        if self._certain is not None:
            self._decide()
        for _ in range(self.counts[sequence]):
            pending = sequence.pending[0]
            if pending in self._choices:
                token, logprobs = self._choices[pending]
                pending.logprobs = logprobs if sequence.logprobs else None
                sequence.rejected = token != pending.token
                pending.token = token
            sequence.accept()
            if sequence.rejected:
                self._proposer.n_rejected += 1
                sequence.pending.clear()
                return

    def _decide(self) -> None:
        """Decides all rows that are in doubt by the dense logits of their own states."""
        certain = cast(list[bool], cast(mx.array, self._certain).tolist())
        self._certain = None
        chosen = {}
        for (sequence, pending, index), is_certain in zip(self._rows, certain, strict=True):
            if not is_certain and sequence in self.snapshots:
                proposal = cast(Proposal, pending.proposal)
                hidden = proposal.hidden[pending.row : pending.row + 1]
                logits = self._proposer.dense_row(hidden)
                chosen[pending] = sequence.choose(logits, index)
        mx.eval([token for token, _ in chosen.values()])
        for pending, (token, logprobs) in chosen.items():
            self._choices[pending] = (cast(int, token.item()), logprobs)


def join(head: FlashHead, tokens: list[PendingToken]) -> Proposal:
    """One proposal of pending tokens, which become its rows."""
    proposals = {id(pending.proposal): cast(Proposal, pending.proposal) for pending in tokens}
    places = {proposal_id: place for place, proposal_id in enumerate(proposals)}
    rows = [(places[id(pending.proposal)], pending.row) for pending in tokens]
    first = cast(Proposal, tokens[0].proposal)
    if rows == [(0, row) for row in range(len(first.hidden))]:
        return first
    token_ids = [cast(int, pending.token) for pending in tokens]
    joined = head.joined([*proposals.values()], rows, token_ids)
    for row, pending in enumerate(tokens):
        pending.proposal = joined
        pending.row = row
    return joined
