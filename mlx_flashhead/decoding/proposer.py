"""Proposes the tokens of sequences, by the policy of their head."""

from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.adjustment import Adjustment
from ..head.draw import Draws
from ..head.flash_head import FlashHead
from ..head.logit_map import IDENTITY, LogitMap
from ..head.steps import NOTHING_ALLOWED
from ..models.errors import UnsupportedHeadError
from ..models.install import (
    LogitChange,
    get_flash_head,
    hidden_dtype,
    is_recognised,
    logit_change_of,
)
from .changes import mask_array, with_few_allowed
from .pace import Pace
from .policy import DecodingPolicy, decoding_mode, policy_of
from .sampler import Trust
from .sequence import PendingToken, Sequence

CPU_BATCH = 32  # sequences at once up to which proposals pay on a CPU
FIRST = "the first of its text"  # token, which the prompt's own logits have chosen
PAUSED = "decoded densely for a while, since that was faster"  # of a text that can be verified
SAMPLED_DENSE = "dense: FlashHead is no faster for sampled text on this machine"
UNKNOWN_FUNCTION = "dense: its sampler, or one of its processors, cannot be verified"


class Proposer:
    """Proposes the tokens of one loop's sequences."""

    def __init__(
        self,
        model: nn.Module,  # of mlx-lm, with a FlashHead or without
        *,
        verify: bool = True,  # by the dense rows; else the FlashHead's own logits choose
        dense: bool = False,  # let the normal (dense) head choose
        n_probes: int | None = None,  # clusters scored per token; None: the head's own numbers
        draw_temperature: float | None = None,  # draw the probes at it, without verification
        max_wait: float | None = None,  # seconds until a token's verification; None: the policy's
    ):
        self.model = model
        self._requested = verify and draw_temperature is None, dense or max_wait == 0
        self._n_probes = n_probes
        self._draw_temperature = draw_temperature
        self.max_wait = max_wait
        self.n_verifications = self.n_rejected = 0
        self._zeros: mx.array | None = None  # in the place of logits that nobody reads
        self._zeros_of: mx.Dtype | None = None  # the dtype of hidden states for which these are
        self.look_for_head()

    def look_for_head(self) -> None:
        """Takes the model's FlashHead. One that is installed between two tokens changes no text."""
        self.head: Any = get_flash_head(self.model)  # a FlashHead, or None
        self.policy = DecodingPolicy() if self.head is None else policy_of(self.head)
        self._change: LogitChange | None = IDENTITY  # from the head's logits to the model's
        if self.head is not None:
            try:
                self._change = logit_change_of(self.model)
            except UnsupportedHeadError:  # these depend on each other
                self._change = None
        verify, dense = self._requested
        gains = self._n_probes is not None or not self.policy.dense
        usable = self.head is not None and not self.policy.drafts_only and not dense
        self.verifies = (
            usable and verify and gains and self._change is not None and is_recognised(self.model)
        )
        self.unverified = usable and not verify

    @property
    def logit_map(self) -> LogitMap | None:
        """What the model does to each of its head's logits; None where no map describes it."""
        return self._change if isinstance(self._change, LogitMap) else None

    @property
    def n_traced(self) -> int:
        """Kinds of proposals that MLX has traced for the head so far."""
        return 0 if self.head is None else cast(FlashHead, self.head).n_traced

    @property
    def max_batch(self) -> int:
        """The number of sequences at once up to which proposals are made.

        C/p sequences read as many rows as the dense head, which reads each row once.
        """
        if self.policy.max_batch is not None:
            return self.policy.max_batch
        if mx.default_device().type == mx.cpu:
            return CPU_BATCH
        n_reading_as_much: int = self.head.n_clusters // self.head.n_probes
        return max(1, n_reading_as_much)

    def mode_of(self, sequence: Sequence, n_handed_out: int = 2) -> str:
        """Returns in words how the latest token of a text was decoded.

        The words are "verified", "unverified", FIRST, or "dense: " and why. ``n_handed_out`` counts
        the tokens since its prompt was read.
        """
        if sequence.verified:
            return FIRST if n_handed_out == 1 else "verified"
        if not sequence.why_dense:
            if self.can_verify(sequence):
                return PAUSED if self.pays(sequence) else SAMPLED_DENSE
            sequence.why_dense = self._why_dense(sequence)
        return sequence.why_dense

    def _why_dense(self, sequence: Sequence) -> str:
        verify, dense = self._requested
        mode = decoding_mode(self.model, verify=verify, dense=dense)
        if mode != "verified":
            return mode
        known = sequence.trust is Trust.EXACT
        return SAMPLED_DENSE if known and not self.pays(sequence) else UNKNOWN_FUNCTION

    def pace_of(self, sequences: Rows[Sequence]) -> Pace | None:
        """The pace of texts like these; None where they are decoded in one way throughout."""
        policy = self.policy
        if not (self.verifies and policy.adapts) or policy.lockstep or self._n_probes is not None:
            return None
        sampled = any(not sequence.greedy for sequence in sequences)
        by_mlx_lm = any(sequence.draws_from_mlx for sequence in sequences)
        key = sampled, by_mlx_lm, len(sequences)
        if key not in policy.paces:
            policy.paces[key] = Pace(policy.dense_seconds if len(sequences) == 1 else None)
        return policy.paces[key]

    def pays(self, sequence: Sequence, n_texts: int = 1) -> bool:
        """Whether proposals may pay for a sequence that is one of ``n_texts``.

        One sampled text was measured when the head was tuned. Several were not: their pace decides,
        but in 16 bits, where each row of a batch whose dense tokens may be verified later costs a
        product of its own.
        """
        policy = self.policy
        if sequence.greedy or self._n_probes is not None or not policy.sampled_dense:
            return True
        return n_texts > 1 and policy.adapts and not policy.lockstep and self._in_float32

    def can_verify(self, sequence: Sequence) -> bool:
        """Returns whether a sequence's choices can be verified.

        A pure function that keeps no bounds can be verified where rounding is as small as
        float32's.
        """
        if self.head is None or not self.verifies or sequence.trust is Trust.UNKNOWN:
            return False
        if not self.pays(sequence, n_texts=2):
            return False
        if sequence.settings is not None and sequence.settings.top_k >= self.head.vocab_size:
            return False  # mlx-lm raises an error of its own
        return sequence.trust is Trust.EXACT or self._in_float32

    @property
    def _in_float32(self) -> bool:
        rows = cast(FlashHead, self.head).clustered.rows
        return rows.logits_dtype(hidden_dtype(self.model)) == mx.float32

    def can_draw_ahead(self, sequence: Sequence) -> bool:
        """Returns whether the sequence's draws can be verified beside others' of mlx-lm's."""
        return (
            self.can_verify(sequence) and sequence.draws_ahead and not self.needs_logits(sequence)
        )

    def reading(self) -> AbstractContextManager[None]:
        """A block in which the model reads prompts.

        Their last logits choose the first token: by the normal (dense) head, or the unverified one.
        """
        if self.head is None:
            return nullcontext()
        return cast(FlashHead, self.head).intercepted(self._project)

    def _project(self, hidden: mx.array) -> mx.array:
        if self.unverified and hidden.shape[-2] == 1:
            logits = self.head.unverified_logits(hidden, self._n_probes, self._draw_temperature)
        else:
            logits = self.head.dense_logits(hidden)
        return cast(mx.array, logits)

    def _no_logits(self, hidden: mx.array) -> mx.array:
        """Zeros in the place of logits that nobody reads: hidden (..., D) → (..., V)."""
        shape = (*hidden.shape[:-1], self.head.vocab_size)
        if self._zeros is None or self._zeros.shape != shape or self._zeros_of != hidden.dtype:
            self._zeros_of = hidden.dtype
            dtype = self.head.clustered.rows.logits_dtype(hidden.dtype)
            self._zeros = mx.broadcast_to(mx.zeros((1,), dtype), shape)
        return mx.array(self._zeros)  # which the model may write into

    def noting(
        self, states: list[mx.array], *, logits: bool = True
    ) -> AbstractContextManager[None]:
        """A block in which the model's forward pass adds the hidden states of the head's calls.

        They go to ``states``. The last one makes the model's logits, which are the normal (dense)
        head's, and nothing computes them unless they are read; or the unverified head's. Without
        ``logits`` they are zeros, since nobody wants them.
        """
        if self.head is None:
            return nullcontext()

        def project(hidden: mx.array) -> mx.array:
            states.append(hidden)
            return self._project(hidden) if logits else self._no_logits(hidden)

        return cast(FlashHead, self.head).intercepted(project)

    def needs_logits(self, sequence: Sequence) -> bool:
        """Whether a choice of the sequence needs the logits of all tokens."""
        if self.logit_map is None or sequence.changes is None or not sequence.changes_few:
            return True
        return not (sequence.unchanged or sequence.changes.fit(self.head.vocab_size))

    def propose(
        self, sequences: Rows[Sequence], hidden: mx.array, latest: mx.array | None = None
    ) -> mx.array:
        """Tokens that are pending then, lazy.

        Args:
            sequences: R of them.
            hidden: (R, D), their states.
            latest: (R,), the tokens of these states, which may not be computed yet; None where the
                sequences know all of their tokens.

        Returns:
            (R,) uint32.
        """
        logit_map = self.logit_map
        needs_logits = [self.needs_logits(sequence) for sequence in sequences]
        masks: list[np.ndarray | None] = [None] * len(sequences)
        adjustment = None
        if not all(sequence.unchanged for sequence in sequences):
            # those that the scored logits decide
            scored = [
                None if needs_all else sequence
                for sequence, needs_all in zip(sequences, needs_logits, strict=True)
            ]
            masks = [None if sequence is None else self._mask(sequence) for sequence in scored]
            adjustment = self._adjustment(scored, latest, masks)
        draws = None
        if any(sequence.draws for sequence in sequences):
            rows = [sequence.draw_at(sequence.n_chosen) for sequence in sequences]
            draws = Draws.of(rows, self.head.vocab_size)
        proposal = self.head.propose(
            hidden,
            draws,
            n_probes=self._n_probes,
            depth=self.policy.depth,
            full=any(needs_logits),
            logit_map=logit_map or IDENTITY,
            adjustment=adjustment,
            allowed=mask_array(masks),
        )
        tokens = proposal.tokens
        full = proposal.full
        if full is not None:
            proposal = proposal._replace(full=None)  # which may be large
            logits = self.model_logits(full)
            picked = [tokens[i : i + 1] for i in range(len(sequences))]
            for i, sequence in enumerate(sequences):
                if needs_logits[i]:
                    picked[i], _ = sequence.choose(logits[i : i + 1], sequence.n_chosen)
            tokens = picked[0] if len(picked) == 1 else mx.concatenate(picked)
        for row, sequence in enumerate(sequences):
            sequence.pending.append(PendingToken(proposal, row, allowed=masks[row]))
        return cast(mx.array, tokens)

    def _adjustment(
        self,
        sequences: Rows[Sequence | None],
        latest: mx.array | None,
        masks: Rows[np.ndarray | None],
    ) -> Adjustment | None:
        """What the penalties and biases of sequences change; nothing in the place of a None.

        Of ``masks`` that allow few tokens these are among them.
        """
        vocab_size = self.head.vocab_size
        changes = [
            None if s is None else with_few_allowed(s.changed_tokens(), mask, vocab_size)
            for s, mask in zip(sequences, masks, strict=True)
        ]
        if all(change is None for change in changes):
            return None
        counted = [s is None or s.n_read == len(s.pending) for s in sequences]
        some = any(counted)
        if latest is None or all(counted):
            latest = None
            some = False
        elif some:
            latest = mx.where(mx.array(counted), vocab_size, latest)
        return Adjustment.of(changes, latest, vocab_size, all_latest=not some)

    def _mask(self, sequence: Sequence) -> np.ndarray | None:
        """Returns what a mask of the sequence allows at its next place.

        It waits for the latest token. If the mask allowed no scored token in that one's place, it
        will be rejected, and nothing is masked after it.
        """
        changes = sequence.changes
        pending = sequence.pending
        if changes is None or changes.mask is None:
            return None
        last = pending[-1] if pending else None
        if last is not None and last.proposal is not None and last.allowed is not None:
            risks = cast(list[float], last.proposal.risk.tolist())
            if risks[last.row] == NOTHING_ALLOWED:
                return None
        return changes.allowed(sequence.context(sequence.n_chosen), self.head.vocab_size)

    def model_logits(self, logits: mx.array) -> mx.array:
        """The head's logits (R, V) as the model gives them."""
        return logits if self._change is None else self._change(logits)

    def dense_row(self, hidden: mx.array) -> mx.array:
        """Returns the model's normal logits (1, V) of one state (1, D) by itself.

        A product of several states rounds otherwise in 16 bits.
        """
        return self.model_logits(self.head.dense_logits(hidden))

    def report(self) -> str:
        """What was used, for a line under a text."""
        if not self.unverified and not self.n_verifications:
            return "FlashHead: not used, the normal (dense) head chose every token"
        n_probes = self.head.unverified_probes if self.unverified else self.head.n_probes
        clusters = f"{self._n_probes or n_probes:,} of {self.head.n_clusters:,} clusters a token"
        if self.unverified:
            return f"FlashHead: unverified, {clusters}"
        counts = f"{self.n_verifications:,} verifications, {self.n_rejected:,} proposals rejected"
        return f"FlashHead: {clusters}, {counts}"


def step_arrays(tokens: mx.array, chosen: Rows[PendingToken]) -> list[Any]:
    """What has to be computed before the tokens of a step can be read, in one evaluation."""
    risks = {id(p.proposal): p.proposal.risk for p in chosen if p.proposal is not None}
    logprobs = [p.logprobs for p in chosen if p.logprobs is not None]
    return [tokens, *risks.values(), *logprobs]
