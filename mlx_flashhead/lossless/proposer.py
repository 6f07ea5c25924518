"""Chooses tokens by a model's FlashHead, for the loops of one sequence and of several."""

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.draw import Draws
from ..head.flash_head import FlashHead
from ..head.steps import Proposal
from ..models.install import LogitChange, get_flash_head, hidden_dtype, logit_change_of, unchanged
from ..models.libraries import UnsupportedHeadError
from .policy import DecodingPolicy, policy_of
from .sampler import Trust
from .sequence import PendingToken, Sequence, current_random_state, normalized


class Proposer:
    """What proposes the tokens of one loop's sequences.

    Args:
        model: A model of mlx-lm, with a FlashHead or without.
        verify: Verify each proposal by the dense rows. Without, the FlashHead's own logits choose.
        dense: Let the normal (dense) head choose.
        n_probes: Clusters scored per token; default: the head's own numbers.
        draw_temperature: Draw the probes at this temperature, without verification.
        max_wait: Seconds that text may wait for its verification; default: the policy's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        verify: bool = True,
        dense: bool = False,
        n_probes: int | None = None,
        draw_temperature: float | None = None,
        max_wait: float | None = None,
    ):
        self.model = model
        self._requested = verify and draw_temperature is None, dense or max_wait == 0
        self._n_probes, self._draw_temperature = n_probes, draw_temperature
        self.max_wait = max_wait
        self.n_verifications = self.n_rejected = 0
        self.look_for_head()

    def look_for_head(self) -> None:
        """Takes the model's FlashHead. One that is installed between two tokens changes no text."""
        self.head: FlashHead | None = get_flash_head(self.model)
        self.policy = DecodingPolicy() if self.head is None else policy_of(self.head)
        self.change: LogitChange | None = unchanged
        if self.head is not None:
            try:
                self.change = logit_change_of(self.model)
            except UnsupportedHeadError:
                self.change = None  # its logits depend on each other
        verify, dense = self._requested
        forced = self._n_probes is not None
        usable = self.head is not None and not self.policy.drafts_only and not dense
        gains = self.change is not None and (forced or not self.policy.dense)
        self.verifies = usable and verify and gains
        self.unverified = usable and not verify

    @property
    def simple(self) -> bool:
        """Whether the model gives its head's logits as they are."""
        return self.change is unchanged

    def can_verify(self, sequence: Sequence) -> bool:
        """Whether a sequence's choices can be verified. A pure function that keeps no bounds can
        where rounding is as small as float32's."""
        if not self.verifies or sequence.trust is Trust.UNKNOWN:
            return False
        assert self.head is not None
        if sequence.settings is not None and sequence.settings.top_k >= self.head.vocab_size:
            return False  # mlx-lm raises an error of its own
        if sequence.trust is Trust.EXACT:
            return True
        dtype = hidden_dtype(self.model)
        return self.head.clustered.rows.logits_dtype(dtype) == mx.float32

    @contextmanager
    def states(self) -> Iterator[list[mx.array]]:
        """A block in which the model's forward pass notes the hidden states of the head's calls,
        the last of which makes its logits. These are the normal (dense) head's, which nothing
        computes unless they are read; or the unverified head's."""
        taken: list[mx.array] = []
        head = self.head
        if head is None:
            yield taken
            return

        def project(hidden: mx.array) -> mx.array:
            taken.append(hidden)
            if self.unverified and hidden.shape[-2] == 1:
                return head.unverified_logits(hidden)
            return head.dense_logits(hidden)

        if self.unverified:
            settings = head.settings(
                n_probes=self._n_probes, draw_temperature=self._draw_temperature
            )
            with settings, head.intercepted(project):
                yield taken
        else:
            with head.intercepted(project):
                yield taken

    def propose(
        self, sequences: Rows[Sequence], hidden: mx.array, latest: mx.array
    ) -> tuple[mx.array, list[PendingToken]]:
        """Tokens of states (R, D), a row a sequence: (R,) uint32, lazy, and as pending tokens.

        ``latest`` (R,) are the tokens before them, which are not read yet.
        """
        assert self.head is not None
        wide = self.change is not unchanged or any(s.needs_logits for s in sequences)
        rows = [s.draw for s in sequences]
        draws = None if all(s.greedy for s, _ in rows) else Draws.of(rows)
        proposal = self.head.propose(
            hidden, draws, n_probes=self._n_probes, depth=self.policy.depth, full=wide
        )
        tokens = proposal.tokens
        chosen = [PendingToken(proposal, row) for row in range(len(sequences))]
        if wide:
            assert proposal.full is not None
            logits = self.model_logits(proposal.full)
            picked = [
                self._pick(s, tokens[i : i + 1], logits[i : i + 1], latest[i : i + 1], chosen[i])
                for i, s in enumerate(sequences)
            ]
            tokens = picked[0] if len(picked) == 1 else mx.concatenate(picked)
        for sequence, pending in zip(sequences, chosen, strict=True):
            sequence.pending.append(pending)
        return tokens, chosen

    def _pick(
        self,
        sequence: Sequence,
        token: mx.array,
        logits: mx.array,
        latest: mx.array,
        pending: PendingToken,
    ) -> mx.array:
        """The token (1,) of a row that may need the model's processed logits."""
        if self.change is unchanged and not sequence.needs_logits:
            return token
        index = sequence.n_chosen
        context = sequence.context(index - 1, latest) if sequence.processors else None
        logits = sequence.process(logits, context)
        before = current_random_state() if sequence.uses_random_state else None
        token = sequence.pick(logits, normalized(logits), index)
        if before is not None:
            pending.random_state = mx.stack([before, current_random_state()])
        return token

    def model_logits(self, logits: mx.array) -> mx.array:
        """The head's logits (R, V) as the model gives them."""
        return logits if self.change is None else self.change(logits)

    def dense_row(self, hidden: mx.array) -> mx.array:
        """The model's normal logits of one state (1, D) by itself: (1, V). A product of several
        states rounds otherwise in 16 bits."""
        assert self.head is not None
        return self.model_logits(self.head.dense_logits(hidden))

    def report(self) -> str:
        """What was used, for a line under a text."""
        assert self.head is not None
        if self.unverified:
            n_probes = self._n_probes or self.head.unverified_probes
            return (
                f"FlashHead: unverified, {n_probes:,} of {self.head.n_clusters:,} clusters a token"
            )
        if not self.n_verifications:
            return "FlashHead: not used, the normal (dense) head chose every token"
        n_probes = self._n_probes or self.head.n_probes
        return (
            f"FlashHead: {n_probes:,} of {self.head.n_clusters:,} clusters a token, "
            f"{self.n_verifications:,} verifications, {self.n_rejected:,} proposals rejected"
        )


def step_arrays(tokens: mx.array, chosen: Rows[PendingToken]) -> list[Any]:
    """What has to be computed before the tokens of a step can be read, in one evaluation."""
    arrays: list[Any] = [tokens]
    proposals: dict[int, Proposal] = {id(p.proposal): p.proposal for p in chosen if p.proposal}
    arrays += [proposal.risk for proposal in proposals.values()]
    arrays += [p.random_state for p in chosen if p.random_state is not None]
    arrays += [p.logprobs for p in chosen if p.logprobs is not None]
    return arrays
