"""Chooses the next tokens of texts: by their FlashHead, which proposes them, or by the dense head.

Whether a text's tokens are proposed is decided here, too, by the policy of the head.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..head.adjustment import Adjustment, ChangedTokens
from ..head.draws.draw import Draw, Draws, Key
from ..head.draws.noise import Noise
from ..head.flash_head import FlashHead
from ..head.logit_map import IDENTITY, LogitMap
from ..head.operations import NOTHING_ALLOWED
from ..models.install import NO_FLASH_HEAD, get_flash_head, hidden_dtype
from ..models.logit_maps import logit_map_of
from ..wide.head_states import HeadStates
from .phase import (
    PAUSED,
    SAMPLED_DENSE,
    SEVERAL_DRAW,
    UNKNOWN_FUNCTION,
    VERIFIED,
    Mode,
    Phase,
)
from .policy import DecodingPolicy, Pace, decoding_mode, policy_of
from .sampling import Changes, SamplerFunction, mask_array, normalized, with_few_allowed
from .settings import DecodingSettings
from .text import PendingToken, Text

# Texts at once up to which proposals pay on a CPU.
CPU_BATCH = 32


class Proposer:
    """Proposes the tokens of one loop's texts.

    Args:
        model: Of mlx-lm, with a FlashHead or without.
        settings: What the caller asks for.

    Attributes:
        n_verifications: Those that were launched.
        n_rejected: Proposals that were rejected.
        n_steps: Of the model, after a prompt.
        n_guessed: Tokens handed out that were guessed, by what has guessed them.
        judged: By what has guessed: tokens of each guess, and how many of them were right.
        head: The model's FlashHead, if it has one.
        policy: The head's.
        logit_map: From the head's logits to the model's; None where no map describes it.
        verifies: Whether texts can be verified.
        unverified: Whether the FlashHead alone chooses.
    """

    def __init__(self, model: nn.Module, settings: DecodingSettings | None = None):
        self.model = model
        self.settings = settings or DecodingSettings()
        self.n_verifications = 0
        self.n_rejected = 0
        self.n_steps = 0
        self.n_guessed: Counter[str] = Counter()
        self.judged: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.head: FlashHead | None = get_flash_head(model)
        self._head_states: HeadStates | None = None
        self.policy = DecodingPolicy()
        if self.head is not None:
            self.policy = policy_of(self.head)
        self._mode = decoding_mode(
            model,
            verify=self.settings.verifies,
            dense=self.settings.decodes_densely,
            n_probes=self.settings.n_probes,
        )
        self.logit_map: LogitMap | None = IDENTITY
        # Otherwise nobody asks the model, which might draw.
        if self._mode.is_verified:
            self.logit_map = logit_map_of(model)
        self.verifies = self._mode.is_verified and self.logit_map is not None
        self.unverified = self._mode.is_unverified

    @property
    def n_traced(self) -> int:
        """Kinds of proposals that MLX has traced for the head so far."""
        return 0 if self.head is None else self.head.n_traced

    @cached_property
    def flash_head(self) -> FlashHead:
        """The model's FlashHead, where it has one.

        Raises:
            ValueError: If it has none, so that nothing is proposed.
        """
        if self.head is None:
            raise ValueError(NO_FLASH_HEAD)
        return self.head

    @property
    def max_batch(self) -> int:
        """The number of texts at once up to which proposals are made.

        C/p texts read as many rows as the dense head, which reads each row once.
        """
        if self.head is None:
            return 0
        if mx.default_device().type == mx.cpu:
            return CPU_BATCH
        n_reading_as_much: int = self.head.n_clusters // self.head.n_probes
        return max(1, n_reading_as_much)

    # How texts are decoded.

    def begin(self, text: Text) -> None:
        """Decides before a text's first token whether it can be verified at all.

        Its functions, the vocabulary, and what decodes the model's text stay what they are.
        """
        if text.why_dense is not None or not text.is_known:
            text.enter(Phase.DENSE)
        if text.why_dense is None:
            text.why_dense = self._why_dense(text)

    def _why_dense(self, text: Text) -> Mode | None:
        """Why no token of a text can be verified; None if they can."""
        if not self._mode.is_verified:
            return self._mode
        head = self.flash_head
        if not (text.is_known and self.verifies):
            return UNKNOWN_FUNCTION
        top_k = cast(Draw, text.settings).top_k
        changes = cast(Changes, text.changes)
        # For so many tokens mlx-lm raises an error of its own.
        if top_k >= head.vocab_size or not changes.fit(head.vocab_size):
            return UNKNOWN_FUNCTION
        return None

    def mode_for(self, text: Text, n_texts: int = 1, *, gains: bool, several_draw: bool) -> Mode:
        """How a text's next tokens are decoded: verified if they may be proposed now, or why not.

        Args:
            text: One of some that decode together.
            n_texts: How many these are.
            gains: Whether texts like it gain by proposals at the time.
            several_draw: Whether several texts draw from MLX's random state.
        """
        if text.why_dense is not None:
            return text.why_dense
        if not self._may_gain(text, n_texts):
            return SAMPLED_DENSE
        if several_draw:
            return SEVERAL_DRAW
        fits = n_texts == 1 or n_texts <= self.max_batch
        if gains and fits:
            return VERIFIED
        return PAUSED

    def may_guess(self, text: Text, n_texts: int, *, several_draw: bool) -> bool:
        """Whether several of a text's next tokens may be guessed now, and computed in a wide step.

        The arguments are those of :meth:`mode_for`. Dense tokens may be guessed, too.
        """
        return n_texts == 1 and not several_draw and text.phase is not Phase.DENSE

    def pace_of(self, texts: list[Text]) -> Pace | None:
        """The pace of texts like these; None where they are decoded in one way throughout."""
        policy = self.policy
        adapts = self.verifies and policy.adapts and not policy.lockstep
        if not adapts or self.settings.n_probes is not None:
            return None
        sampled = any(not text.greedy for text in texts)
        by_mlx_lm = any(text.draws_from_mlx for text in texts)
        key = sampled, by_mlx_lm, len(texts)
        if key not in policy.paces:
            dense_seconds = None
            if policy.tuning is not None and len(texts) == 1:
                dense_seconds = policy.tuning.dense_seconds
            policy.paces[key] = Pace(dense_seconds)
        return policy.paces[key]

    def _may_gain(self, text: Text, n_texts: int) -> bool:
        """Whether a text that is one of ``n_texts`` may gain by proposals on this machine.

        One sampled text was measured when the head was tuned. Several were not: their pace decides,
        but not where each text of a batch whose dense tokens may be verified later costs a product
        of its own.
        """
        policy = self.policy
        if text.greedy or self.settings.n_probes is not None or not policy.sampled_dense:
            return True
        if n_texts == 1 or not policy.adapts or policy.lockstep:
            return False
        head = cast(FlashHead, self.head)
        return not head.differs_in_batches(hidden_dtype(self.model))

    def can_verify(self, text: Text) -> bool:
        """Whether a text that has begun may be verified at some time, in a batch of any size."""
        return text.why_dense is None and self._may_gain(text, n_texts=2)

    # The states with which the head is called, and the logits of these.

    def reading(self, states: list[mx.array] | None = None) -> AbstractContextManager[None]:
        """A block in which the model reads prompts.

        Their last logits choose the first token: by the normal (dense) head, or the unverified one.

        Args:
            states: Gets the states (R, n, D) of each call of the head; None where none are wanted.
        """
        if self.head is None:
            return self._noting_dense(states)
        if states is None:
            return self.head.intercepted(self._project)
        return self.head.intercepted(self._noting_project(states))

    def noting(
        self, states: list[mx.array], *, logits: bool = True
    ) -> AbstractContextManager[None]:
        """A block in which the model's forward pass adds the hidden states of the head's calls.

        They go to ``states``. The last one makes the model's logits, which are the normal (dense)
        head's, and nothing computes them unless they are read; or the unverified head's. Without
        ``logits`` they are zeros, since nobody wants them.
        """
        if self.head is None:
            return self._noting_dense(states)
        head = self.head

        def project(hidden: mx.array) -> mx.array:
            states.append(hidden)
            if not logits:
                return mx.zeros((*hidden.shape[:-1], head.vocab_size), hidden.dtype)
            # Each position is computed as in a step of its own.
            if hidden.shape[1] > 1:
                return head.dense_logits_of_each(hidden)
            return self._project(hidden)

        return head.intercepted(project)

    def hear_states(self) -> None:
        """From now on the states are noted of a model without a FlashHead, too."""
        if self.head is None and self._head_states is None:
            self._head_states = HeadStates(self.model)

    def _noting_dense(self, states: list[mx.array] | None) -> AbstractContextManager[None]:
        """As :meth:`noting`, where :meth:`hear_states` was called."""
        if self._head_states is None or states is None:
            return nullcontext()
        return self._head_states.noted(states)

    def _noting_project(self, states: list[mx.array]) -> Callable[[mx.array], mx.array]:
        def project(hidden: mx.array) -> mx.array:
            states.append(hidden)
            return self._project(hidden)

        return project

    def _project(self, hidden: mx.array) -> mx.array:
        if self.unverified and hidden.shape[-2] == 1:
            settings = self.settings
            return self.flash_head.unverified_logits(
                hidden, settings.n_probes, settings.draw_temperature
            )
        return self.flash_head.dense_logits(hidden)

    # Their tokens.

    def propose(
        self,
        texts: list[Text],
        hidden: mx.array,
        latest: mx.array | None = None,
        guesses: list[int] | None = None,
    ) -> mx.array:
        """Tokens that are pending then, lazy.

        Args:
            texts: R of them; in a wide step the same one R times.
            hidden: (R, D), their states.
            latest: (R,), the tokens of these states, which may not be computed yet; None where the
                texts know all of their tokens.
            guesses: What is expected as the first tokens that are proposed, in a wide step.

        Returns:
            (R,) uint32.
        """
        head = self.flash_head
        vocab_size = head.vocab_size
        sampled = not all([text.greedy for text in texts])
        changed = not all([text.unchanged for text in texts])
        draws: list[tuple[Draw, Key]] = []
        masks: list[np.ndarray | None] = []
        changes: list[ChangedTokens | None] = []
        # Whether each text knows the token of its state.
        counted: list[bool] = []
        made = []
        for position, text in enumerate(texts):
            pending = PendingToken(position=position)
            if sampled:
                draws.append(text.draw_at(text.n_chosen))
            if changed:
                pending.allowed = self._mask(text)
                masks.append(pending.allowed)
                few = with_few_allowed(text.changed_tokens(), pending.allowed, vocab_size)
                changes.append(few)
                counted.append(text.knows_latest)
            if guesses and position < len(guesses):
                pending.token = guesses[position]
            made.append(pending)
            text.pending.append(pending)
        adjustment = None
        if changed:
            adjustment = _adjustment(changes, counted, latest, vocab_size)
        drawn = None
        if sampled:
            drawn = Draws.of(draws)
        proposal = head.propose(
            hidden,
            drawn,
            n_probes=self.settings.n_probes,
            depth=self.policy.depth,
            logit_map=cast(LogitMap, self.logit_map),
            adjustment=adjustment,
            allowed=mask_array(masks),
        )
        for pending in made:
            pending.proposal = proposal
        return proposal.tokens

    def _mask(self, text: Text) -> np.ndarray | None:
        """Returns what a mask of the text allows at its next place.

        It waits for the latest token. If the mask allowed no scored token in that one's place, it
        will be rejected, and nothing is masked after it.
        """
        changes = text.changes
        pending = text.pending
        if changes is None or changes.mask is None:
            return None
        if pending and pending[-1].proposal is not None and pending[-1].allowed is not None:
            risks = cast(list[float], pending[-1].proposal.risk.tolist())
            if risks[pending[-1].position] == NOTHING_ALLOWED:
                return None
        return changes.mask.allowed(text.context(text.n_chosen), self.flash_head.vocab_size)

    def choose_densely(
        self,
        texts: list[Text],
        logits: mx.array,
        others: list[Text],
        states: mx.array | None = None,
    ) -> mx.array:
        """Tokens that the normal (dense) head chooses as mlx-lm's loops do. They are pending then.

        Args:
            texts: R of them.
            logits: The model's logits (R, V).
            others: Those beside them in the batch: mlx-lm calls a sampler that all share once.
            states: Their states (R, D), where several texts were fed at once.

        Returns:
            The tokens (R,), lazy.
        """
        n = len(texts)
        each = [logits]
        if n > 1:
            each = [logits[i : i + 1] for i in range(n)]
        head = self.head
        if states is not None and head is not None and head.differs_in_batches(states.dtype):
            # A text that can be verified reads as it does alone.
            for i, text in enumerate(texts):
                if self.can_verify(text):
                    each[i] = self.dense_logits(states[i : i + 1])
        # A text that was rolled back comes last in the batch, and draws in its turn.
        order = sorted(range(n), key=lambda i: texts[i].joined)
        tokens = _choose_in_turn([texts[i] for i in order], [each[i] for i in order], others)
        if order == list(range(n)):
            return tokens
        return tokens[mx.argsort(mx.array(order))]

    def model_logits(self, logits: mx.array) -> mx.array:
        """The head's logits (R, V) as the model gives them, where a map describes that."""
        return cast(LogitMap, self.logit_map)(logits)

    def dense_logits(self, hidden: mx.array) -> mx.array:
        """Returns the model's normal logits (1, V) of one state (1, D) by itself.

        A product of several states rounds otherwise in 16 bits.
        """
        return self.model_logits(self.flash_head.dense_logits(hidden))


def _adjustment(
    changes: list[ChangedTokens | None],
    counted: list[bool],
    latest: mx.array | None,
    vocab_size: int,
) -> Adjustment | None:
    """What the penalties and biases of texts change; None if nothing.

    The ``latest`` tokens (R,) count in addition where they are not ``counted``.
    """
    if all(change is None for change in changes):
        return None
    if all(counted):
        latest = None
    elif latest is not None and any(counted):
        latest = mx.where(mx.array(counted), vocab_size, latest)
    return Adjustment.of(changes, latest, vocab_size)


def _choose_in_turn(texts: list[Text], each: list[mx.array], others: list[Text]) -> mx.array:
    """Chooses tokens (R,) by the logits (1, V) of each text, in the order in which they draw."""
    first = texts[0]
    if len(texts) == 1:
        return first.extend(each[0])
    shared = all(
        text.shares_sampler and text.sampler is first.sampler for text in [*others, *texts]
    )
    if shared and first.draws_from_mlx and not first.ahead:
        processed = [
            text.process(own, text.context(text.n_chosen))
            for text, own in zip(texts, each, strict=True)
        ]
        logprobs = normalized(mx.concatenate(processed))
        # The sampler is called once, as mlx-lm does.
        tokens = cast(SamplerFunction, first.sampler)(logprobs)
    elif all(isinstance(text.settings, Noise) and not text.current_processors for text in texts):
        # One draw takes a fraction of the operations.
        together = mx.concatenate(each)
        logprobs = normalized(together)
        tokens = Draws.of([text.draw_at(text.n_chosen) for text in texts]).choose(together)
    else:
        return mx.concatenate([text.extend(own) for text, own in zip(texts, each, strict=True)])
    for text, own in zip(texts, logprobs, strict=True):
        text.add_dense(own)
    return tokens


def step_arrays(tokens: mx.array, chosen: list[PendingToken]) -> list[Any]:
    """What has to be computed before the tokens of a step can be read, in one evaluation."""
    risks = {id(p.proposal): p.proposal.risk for p in chosen if p.proposal is not None}
    logprobs = [p.logprobs for p in chosen if p.logprobs is not None]
    return [tokens, *risks.values(), *logprobs]
