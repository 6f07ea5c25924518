"""Pending tokens are verified by the head: which rows are due, and what a rejected one means."""

from typing import NamedTuple, cast

import mlx.core as mx

from ..head.draws.draw import Draws
from ..head.flash_head import FlashHead
from ..head.logit_map import LogitMap
from ..head.proposal import Proposal
from ..head.verdict import Verdict
from .caches import RowMark
from .changes import Changes, mask_array
from .proposer import Proposer
from .sampler import normalized
from .text import PendingToken, Text


class _Case(NamedTuple):
    """A pending token that is verified.

    Attributes:
        text: Whose it is.
        pending: The token.
        place: In the text.
    """

    text: Text
    pending: PendingToken
    place: int


class Verification:
    """A verification of the pending tokens that are read.

    It is launched when made, and read by :meth:`accept`. ``marks`` are those of the
    ``texts`` as they are now.
    """

    def __init__(self, proposer: Proposer, texts: list[Text], marks: list[RowMark]):
        self._proposer = proposer
        self.marks = dict(zip(texts, marks, strict=True))
        self.counts = {text: text.n_read for text in texts}
        self._cases = [
            _Case(text, text.pending[i], len(text.tokens) + i)
            for text, n in self.counts.items()
            for i in range(n)
            if text.pending[i].proposal is not None
        ]
        # Until it is read.
        self._verdict: Verdict | None = None
        self._has_logprobs = False
        # The dense choices of tokens in doubt, with their log-probabilities (V,).
        self._choices: dict[PendingToken, tuple[int, mx.array]] = {}
        if self._cases:
            proposer.n_verifications += 1
            self._verdict = _verdict(proposer, self._cases)
            if self._verdict.ready:
                self._note_logprobs(self._verdict)

    @property
    def ready(self) -> bool:
        """Whether it is time to :meth:`accept`: no thread is at work, or it is waited for."""
        return self._verdict is None or self._verdict.ready or self._proposer.policy.lockstep

    def _note_logprobs(self, verdict: Verdict) -> None:
        """Notes the log-probabilities of the tokens. They are lazy, since few are read."""
        self._has_logprobs = True
        for row, (text, pending, place) in enumerate(self._cases):
            if text.logprobs:
                logits = text.process(verdict.logits(row), text.context(place))
                pending.logprobs = normalized(logits)[0]

    def forget(self, texts: list[Text]) -> None:
        """Drops what was launched for some texts."""
        for text in texts:
            self.marks.pop(text, None)

    def accept(self, text: Text) -> None:
        """Waits for the verification and accepts the text's tokens up to a rejected one.

        The dense choice takes its place, and nothing is pending any more.
        """
        if self._verdict is not None:
            self._decide(self._verdict)
            self._verdict = None
        for _ in range(self.counts[text]):
            pending = text.pending[0]
            if pending in self._choices:
                token, logprobs = self._choices[pending]
                if text.logprobs:
                    pending.logprobs = logprobs
                text.rejected = token != pending.token
                pending.token = token
            text.accept()
            if text.rejected:
                self._proposer.n_rejected += 1
                text.pending.clear()
                return

    def _decide(self, verdict: Verdict) -> None:
        """Decides all tokens that are in doubt by the dense logits of their own states."""
        in_doubt = verdict.in_doubt()
        if not self._has_logprobs:
            self._note_logprobs(verdict)
        chosen = {}
        for (text, pending, place), doubt in zip(self._cases, in_doubt, strict=True):
            if doubt and text in self.marks:
                proposal = cast(Proposal, pending.proposal)
                hidden = proposal.hidden[pending.row : pending.row + 1]
                logits = self._proposer.dense_row(hidden)
                chosen[pending] = text.choose(logits, place)
        mx.eval([token for token, _ in chosen.values()])
        for pending, (token, logprobs) in chosen.items():
            self._choices[pending] = (cast(int, token.item()), logprobs)


def _verdict(proposer: Proposer, cases: list[_Case]) -> Verdict:
    """Asks the head about pending tokens."""
    head = proposer.flash_head
    pending = [case.pending for case in cases]
    # Before they are joined: with these a thread need not wait for the step that is running.
    sources = [(cast(Proposal, each.proposal).hidden, each.row) for each in pending]
    # The text's processors are known, since it is verified.
    stretches = [cast(Changes, case.text.changes).stretch for case in cases]
    draws = None
    if not all([case.text.greedy for case in cases]):
        draws = Draws.of([case.text.draw_at(case.place) for case in cases])
    return head.verify(
        join(head, pending),
        draws,
        logit_map=cast(LogitMap, proposer.logit_map),
        allowed=mask_array([each.allowed for each in pending]),
        stretches=stretches,
        sources=sources,
    )


def join(head: FlashHead, tokens: list[PendingToken]) -> Proposal:
    """One proposal of pending tokens, which become its rows."""
    proposals = {id(pending.proposal): cast(Proposal, pending.proposal) for pending in tokens}
    numbers = {proposal_id: number for number, proposal_id in enumerate(proposals)}
    rows = [(numbers[id(pending.proposal)], pending.row) for pending in tokens]
    first = cast(Proposal, tokens[0].proposal)
    if rows == [(0, row) for row in range(len(first.hidden))]:
        return first
    token_ids = [cast(int, pending.token) for pending in tokens]
    joined = head.joined([*proposals.values()], rows, token_ids)
    for row, pending in enumerate(tokens):
        pending.proposal = joined
        pending.row = row
    return joined
