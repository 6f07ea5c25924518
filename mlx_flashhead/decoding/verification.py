"""Verification of pending tokens: when they are verified, what is due, and what is accepted then.

:class:`VerifySchedule` says when, :class:`Verification` asks the head about one lot of them. The
head knows how (``head/verdict.py``).
"""

import time
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

from ..head.draws.draw import Draws
from ..head.flash_head import FlashHead
from ..head.logit_map import LogitMap
from ..head.proposal import Proposal
from ..head.verdict import Verdict
from .caches import TextMark
from .proposer import Proposer
from .sampling import Changes, mask_array, normalized
from .text import PendingToken, Text

# Tokens that may be read while a verification is computed.
MAX_READ = 64
# Tokens that may wait longer, on a machine that is slow to compute them.
FEW = 4


class VerifySchedule:
    """Has the pending tokens of some texts verified, and accepts up to the first rejected one.

    The first verifications come after few tokens, so that text begins to flow early, and each later
    one after twice as many; after half as many where a token was rejected, since those after it
    were computed in vain.

    Args:
        proposer: Has proposed the tokens.
        mark: Makes marks of some texts at the tokens that their caches hold.
    """

    def __init__(self, proposer: Proposer, mark: Callable[[list[Text]], list[TextMark]]):
        self._proposer = proposer
        self._mark = mark
        self._verification: Verification | None = None
        # The numbers of tokens that a verification waits for, that the last one had, and that wait
        # for a launch.
        self._limit = proposer.policy.first_pending
        self._n_launched = 0
        self._n_waiting = 0
        # The sum of their risks for each text: a rejection loses only tokens of its own text.
        self._risks: dict[Text, float] = {}
        # When the first of the waiting tokens was read.
        self._since = 0.0
        self._unjoined: list[PendingToken] = []
        # Verifications that were read.
        self.n_verified = 0
        # Arrays of pending tokens, which are computed with the next step.
        self.joined: list[mx.array] = []

    def step(self, texts: list[Text]) -> None:
        """Accepts what is decided after a step, which has read tokens of each text.

        Afterwards the caller rolls back the caches of texts with a rejected token.
        """
        self.joined = []
        verification = self._verification
        if verification is not None:
            n_read = max([text.n_read for text in texts], default=0)
            if verification.ready or n_read >= MAX_READ:
                self._accept()
        ends = False
        for text in texts:
            ends |= self._note_read(text)
            _accept_dense(text)
        if ends and self._verification is not None:
            self._accept()
        waiting = [text for text in texts if text.n_read]
        due = self._due or not all([text.proposing for text in waiting])
        if waiting and self._verification is None and (ends or due):
            self._launch(waiting)
            if ends:
                # It waits, since the next step may be of no use.
                self._accept()
        elif self._unjoined:
            self._join_early(self._proposer.flash_head)

    def _join_early(self, head: FlashHead) -> None:
        """Joins the pending tokens with the next step where there are enough of them."""
        if len(self._unjoined) == head.joined_early:
            proposal = join(head, self._unjoined)
            self._unjoined = []
            self.joined = [proposal.hidden, proposal.probes, proposal.logits]

    def flush(self, text: Text) -> None:
        """Accepts the text's tokens that are read, up to a rejected one, without delay."""
        if self._verification is not None:
            self._accept()
        if text.n_read and not text.rejected:
            first = text.pending[0]
            if first.proposal is None:
                text.accept()
            else:
                self._launch([text])
                self._accept()

    def forget(self, texts: list[Text]) -> None:
        """Verifies the pending tokens of some texts no more."""
        if self._verification is not None:
            self._verification.forget(texts)
        for text in texts:
            self._risks.pop(text, None)
        self._unjoined = [
            pending
            for pending in self._unjoined
            if not any(pending in text.pending for text in texts)
        ]

    def _note_read(self, text: Text) -> bool:
        """Takes note of pending tokens that are read, once. Returns whether one ends the text.

        What the dense logits chose needs no note where nothing is pending before it. Nothing is
        read after a token that was rejected.
        """
        n_read = text.n_read
        n_noted = n_read
        while n_noted and not text.pending[n_noted - 1].noted:
            n_noted -= 1
        proposed = n_noted > 0
        ends = False
        for index in range(n_noted, n_read):
            pending = text.pending[index]
            if pending.proposal is not None:
                proposed = True
            if not proposed:
                continue
            self._wait_for(text, pending)
            if len(text.tokens) + index + 1 == text.limit:
                ends = True
            if pending.token in self._proposer.flash_head.eos_token_ids:
                ends = True
        return ends

    def _wait_for(self, text: Text, pending: PendingToken) -> None:
        """Has a token of a text wait for the next launch."""
        pending.noted = True
        if self._n_waiting == 0:
            self._since = time.perf_counter()
        self._n_waiting += 1
        self._risks[text] = self._risks.get(text, 0.0) + pending.risk
        if pending.proposal is not None:
            self._unjoined.append(pending)

    @property
    def _due(self) -> bool:
        policy = self._proposer.policy
        few = FEW
        seconds = policy.max_wait
        max_wait = self._proposer.settings.max_wait
        if max_wait is not None:
            few = 1
            seconds = max_wait
        if self._n_waiting >= min(self._limit, policy.max_pending):
            return True
        if max(self._risks.values(), default=0.0) >= policy.max_risk:
            return True
        waited = time.perf_counter() - self._since
        return self._n_waiting >= few and waited >= seconds and not policy.lockstep

    def _launch(self, texts: list[Text]) -> None:
        self._n_launched = self._n_waiting
        self._n_waiting = 0
        self._risks = {}
        self._limit = min(2 * self._limit, self._proposer.policy.max_pending)
        self._unjoined = []
        marks = self._mark(texts)
        self._verification = Verification(self._proposer, texts, marks)

    def _accept(self) -> None:
        """Waits for the verification. A text that goes on keeps the mark of its launch."""
        verification = self._verification
        assert verification is not None
        self._verification = None
        self.n_verified += 1
        for text, mark in verification.marks.items():
            verification.accept(text)
            if text.rejected:
                self._limit = max(self._n_launched // 2, self._proposer.policy.first_pending)
                continue
            text.marks.append(mark)
            _accept_dense(text)


def _accept_dense(text: Text) -> None:
    """Accepts what the dense logits chose, up to the first token that was proposed."""
    while text.n_read and text.pending[0].proposal is None:
        text.accept()


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

    def __init__(self, proposer: Proposer, texts: list[Text], marks: list[TextMark]):
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
        for position, (text, pending, place) in enumerate(self._cases):
            if text.logprobs:
                logits = text.process(verdict.logits(position), text.context(place))
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
                hidden = proposal.hidden[pending.position : pending.position + 1]
                logits = self._proposer.dense_logits(hidden)
                chosen[pending] = text.choose(logits, place)
        mx.eval([token for token, _ in chosen.values()])
        for pending, (token, logprobs) in chosen.items():
            self._choices[pending] = (cast(int, token.item()), logprobs)


def _verdict(proposer: Proposer, cases: list[_Case]) -> Verdict:
    """Asks the head about pending tokens."""
    head = proposer.flash_head
    pending = [case.pending for case in cases]
    # Before they are joined: with these a thread need not wait for the step that is running.
    sources = [(cast(Proposal, each.proposal).hidden, each.position) for each in pending]
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
    """One proposal of pending tokens, in their order."""
    proposals = {id(pending.proposal): cast(Proposal, pending.proposal) for pending in tokens}
    numbers = {proposal_id: number for number, proposal_id in enumerate(proposals)}
    positions = [(numbers[id(pending.proposal)], pending.position) for pending in tokens]
    first = cast(Proposal, tokens[0].proposal)
    if positions == [(0, position) for position in range(len(first.hidden))]:
        return first
    token_ids = [cast(int, pending.token) for pending in tokens]
    joined = head.joined([*proposals.values()], positions, token_ids)
    for position, pending in enumerate(tokens):
        pending.proposal = joined
        pending.position = position
    return joined
