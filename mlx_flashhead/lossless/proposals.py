"""What stands in the head's place while a loop of mlx-lm generates: the head's call chooses tokens
from the rows that it scores and keeps the states, and the sampler hands the tokens out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.draw import Draws
from ..head.flash_head import FlashHead
from ..head.steps import Proposal
from ..models.install import get_flash_head
from ..models.logit_change import logit_change_of, unchanged
from ..models.model_errors import UnsupportedHeadError
from .sequence import GREEDY, Position, Text, current_random_state


class Proposer:
    """Chooses the tokens of one loop's texts: proposals that are checked, ``dense`` choices, or the
    bare head's. ``settings`` are more keywords of ``FlashHead.settings``."""

    def __init__(
        self, model: nn.Module, *, verify: bool, dense: bool = False, settings: dict | None = None
    ):
        self._model, self._wanted, self._settings = model, (verify, dense), settings or {}
        self.change: Callable[[mx.array], mx.array] | None = unchanged
        self.dense, self.verify = True, False
        self.look_for_head()
        # The texts of the next call's rows, in their order. Without them a call is dense, as for a
        # prompt and for the first token after it. A call takes them.
        self.texts: list[Text] | None = None
        self.n_verifications = self.n_rejected = (
            0  # checks, and tokens for which they chose another one
        )
        self._row = 0
        self._proposal: Proposal | None = None
        self._tokens: mx.array | None = None
        self._logits: mx.array | None = None
        self._processed: dict[Text, mx.array] = {}

    def report(self) -> str:
        assert self.head is not None
        if self.dense:
            why = "it is no faster here" if self.head.stays_dense else "every token was scored"
            return f"FlashHead: not used, {why}"
        clusters = self._settings.get("n_probes") or (
            self.head.checked_probes if self.verify else self.head.n_probes
        )
        line = f"FlashHead: {clusters:,} of {self.head.n_clusters:,} clusters a token"
        if not self.verify:
            return f"{line}, no check"
        return f"{line}, {self.n_verifications:,} checks, {self.n_rejected:,} other choices"

    def look_for_head(self) -> None:
        """Takes the model's FlashHead. One that is installed between two tokens changes no text."""
        self.head: FlashHead | None = get_flash_head(self._model)
        if self.head is None:
            return
        try:
            self.change = logit_change_of(self._model)
        except UnsupportedHeadError:
            self.change = None  # its logits depend on each other: every choice is dense
        verify, dense = self._wanted
        chosen = self._settings.get("n_probes") is not None
        gains = self.change is not None and (chosen or not self.head.stays_dense)
        self.dense = dense or (verify and not gains)
        self.verify = verify and not self.dense

    def in_place(self) -> AbstractContextManager:
        """A block in which the head's calls come here."""
        if self.head is None:
            return nullcontext()
        return self.head.settings(project=self._project, **self._settings)

    def with_draft(self) -> AbstractContextManager:
        """A block for mlx-lm's loop with a draft model: the head scores every token of several
        positions in one product, or without the check as it is set."""
        if self.head is None:
            return nullcontext()
        if self.verify or self.dense:
            return self.head.dense()
        return self.head.settings(**self._settings)

    def hooks(self, text: Text, before: list[int] | None = None) -> dict[str, Any]:
        """A text's sampler and processors for mlx-lm's loop, which see the tokens ``before``
        too."""
        prefix = mx.array(before, dtype=mx.uint32) if before else None
        reads_logits = text.needs_logits or self.change is not unchanged or self.head is None
        processors = [partial(self._process, text, prefix)] if reads_logits else []
        return {"sampler": partial(self._take, text), "logits_processors": processors}

    def _project(self, head: FlashHead, hidden: mx.array) -> mx.array:
        """Takes the head's place: (R, L, D) → logits (R, L, V), or (R, L, 1) that say nothing."""
        self._row, self._proposal, self._tokens = 0, None, None
        self._processed.clear()
        texts, self.texts = self.texts, None
        if self.dense or texts is None or hidden.shape[1] != 1 or len(texts) != len(hidden):
            return self._full(dense_logits(head, hidden))
        if not self.verify:
            if any(t.logprobs or t.needs_logits or t.settings != GREEDY for t in texts):
                return self._full(head.full_logits(hidden))
            self._tokens = head.token(hidden)[:, -1]
            return _nothing(hidden)
        too_many = len(texts) > head.checked_positions
        if too_many or any(_needs_dense(text, head, hidden.dtype) for text in texts):
            return self._full(dense_logits(head, hidden))
        settings = [(text.settings or GREEDY, text.key(text.n_chosen)) for text in texts]
        draws = None if all(s.greedy for s, _ in settings) else Draws.of(settings)
        wide = self.change is not unchanged or any(text.needs_logits for text in texts)
        self._proposal = head.propose(hidden[:, -1], draws, full=wide)
        self._tokens, full = self._proposal.tokens, self._proposal.full
        return _nothing(hidden) if full is None else self._full(full[:, None])

    def _full(self, logits: mx.array) -> mx.array:
        self._logits = logits[:, -1]
        return logits

    def _process(
        self, text: Text, prefix: mx.array | None, tokens: mx.array, logits: mx.array
    ) -> mx.array:
        """A processor for mlx-lm's loop: all of the text's."""
        if prefix is not None:
            tokens = mx.concatenate([prefix, tokens.astype(mx.uint32)])
        self._processed[text] = text.process(logits, tokens=tokens)
        return self._processed[text]

    def _take(self, text: Text, logprobs: mx.array) -> mx.array:
        """A sampler for mlx-lm's loop, called for one row after the other: the token, (1,)."""
        row, index = self._row, text.n_chosen
        self._row += 1
        position = Position(self._proposal, row)
        in_head = not text.needs_logits and (self.change is unchanged or not self.verify)
        if self._tokens is not None and in_head:
            token = self._tokens[row : row + 1]
        else:
            if text.replays:
                position.random_state = current_random_state()
            logits = self._processed.pop(text, None)
            if logits is None:
                assert self._logits is not None
                logits = self._logits[row : row + 1]
            token = text.pick(logits, logprobs, index)
            if position.dense and text.logprobs:
                position.logprobs = logprobs.reshape(-1)
        text.waiting.append(position)
        waited = [token]
        if self._proposal is not None:
            waited.append(self._proposal.risk)
        if position.random_state is not None:
            waited.append(position.random_state)
        mx.async_eval(waited)
        return token


def dense_logits(head: FlashHead, hidden: mx.array) -> mx.array:
    """The dense logits of each position by itself, (R, L, D) → (R, L, V): a product of several rows
    rounds otherwise in 16 bits. Positions of a prompt are not read, and stay together."""
    n_rows, length = hidden.shape[:2]
    if n_rows == 1 or length != 1 or _is_fine(head, hidden.dtype):
        return head.dense_logits(hidden)
    return mx.concatenate([head.dense_logits(hidden[i : i + 1]) for i in range(n_rows)])


def _needs_dense(text: Text, head: FlashHead, dtype: mx.Dtype) -> bool:
    """Whether a text's choice may depend on rounding in 16 bits, so that no check can tell: by a
    sampler of others, or a processor that stretches differences."""
    moves_much = text.settings is None or not all(map(preserves_margins, text.processors))
    return moves_much and not _is_fine(head, dtype)


def preserves_margins(processor: Any) -> bool:
    """Whether a processor at most doubles the distance of two logits: masks, biases, penalties."""
    return getattr(processor, "preserves_margins", False) or (
        getattr(processor, "__module__", "") == "mlx_lm.sample_utils"
    )


def _is_fine(head: FlashHead, dtype: mx.Dtype) -> bool:
    return head.clustered.rows.logits_dtype(dtype) == mx.float32


def _nothing(hidden: mx.array) -> mx.array:
    return mx.zeros((*hidden.shape[:2], 1))
