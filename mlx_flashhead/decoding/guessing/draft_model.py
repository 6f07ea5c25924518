"""A draft model: a smaller model with the same tokens, which guesses what the target will choose.

Its own rounding is of no matter: the target's wide step decides.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...models.install import get_flash_head
from ..caches import copied_layers
from ..policy import policy_of
from ..sampler import normalized
from ..sequence import Sequence

LATEST = 256  # tokens of a text that a draft model's FlashHead always scores
STEP_SIZE = 2048  # tokens that are read at once


class DraftModel:
    """A draft model in one text.

    It draws as the target does, from its own logits: the same number, or the same noise. Models of
    one family may have some tokens more or less at the end of their vocabularies.

    Args:
        model: The draft model, with a FlashHead or without.
        layers: Its caches.
        n_drafts: Tokens that it guesses at a time, at most.
        n_prompt: Tokens before the text.
        n_held: How many of these the caches hold.
        scores_few: Whether its FlashHead, if it has one, scores few tokens; not where the target
            drafts for itself.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Any],
        n_drafts: int,
        n_prompt: int,
        n_held: int = 0,
        *,
        scores_few: bool = True,
    ):
        self.n_drafts = n_drafts
        self._model: Any = model
        self._layers = layers
        self._scores_few = scores_few
        # tokens of its vocabulary, by logits of which nothing is computed
        self._n_tokens: int = self._model(mx.zeros((1, 1), mx.uint32)).shape[-1]
        self._n_prompt = n_prompt
        self._n_held = n_held  # tokens that are known and in the caches
        self._fed = mx.zeros(0, mx.uint32)  # those after them, which are drafts but for the first
        self._copies: list[Any] = []  # of caches that cannot be trimmed, without these

    def drafts(self, known: list[int], latest: mx.array, n: int, text: Sequence) -> mx.array:
        """Guesses ``n`` tokens, (n,) uint32, lazy.

        Args:
            known: The tokens of the prompt and the text before the latest one.
            latest: (1,), the latest token, which may not be computed yet.
            n: How many.
            text: The text.
        """
        recent = sorted({token for token in known[-LATEST:] if token < self._n_tokens})
        n_common = min(self._n_tokens, text.vocab_size or self._n_tokens)
        with self._scoring(recent):
            while len(known) - self._n_held > STEP_SIZE:
                self._feed(mx.array(known[self._n_held : self._n_held + STEP_SIZE], mx.uint32))
                mx.eval([layer.state for layer in self._layers])
                self._n_held += STEP_SIZE
            if len(known) > self._n_held:
                self._feed(mx.array(known[self._n_held :], mx.uint32))
                self._n_held = len(known)
            self._copies = copied_layers(self._layers)
            drafts = [latest.astype(mx.uint32)]
            for i in range(n):
                logits = self._feed(drafts[-1])[:, :n_common]
                place = text.n_chosen + i
                drafts.append(text.pick(logits, normalized(logits), place).astype(mx.uint32))
        self._fed = mx.concatenate(drafts[:-1])
        return mx.concatenate(drafts[1:])

    def note(self, n_accepted: int) -> None:
        """Takes back all drafts but the first ``n_accepted``."""
        n_right = min(1 + n_accepted, len(self._fed))
        n_wrong = len(self._fed) - n_right
        if n_wrong:
            replays = any(copied is not None for copied in self._copies)
            for layer, copied in zip(self._layers, self._copies, strict=True):
                if copied is not None:
                    vars(layer).update(vars(copied))
                else:
                    layer.trim(len(self._fed) if replays else n_wrong)
            if replays:
                self._feed(self._fed[:n_right])
        self._n_held += n_right
        self._fed = self._fed[:0]

    def leave(self, text: list[int]) -> None:
        """Leaves the prompt and the tokens of the text in the caches, where these can be trimmed.

        Others may hold a few tokens more or less. The next text's drafts are worse then, and the
        text is the same.
        """
        n_ahead = self._n_held - self._n_prompt - len(text)
        if n_ahead > 0 and all(copied is None for copied in self._copies):
            for layer in self._layers:
                layer.trim(n_ahead)
        elif n_ahead < 0:
            self._feed(mx.array(text[n_ahead:], mx.uint32))

    def _feed(self, tokens: mx.array) -> mx.array:
        """Feeds tokens (n,). Returns the logits (1, V) after the last one, lazy."""
        tokens = mx.minimum(tokens, self._n_tokens - 1)
        logits = self._model(tokens[None], cache=self._layers)
        return cast(mx.array, logits[:, -1, :])

    def _scoring(self, recent: list[int]) -> AbstractContextManager[None]:
        """A block in which the model's FlashHead, if it has one, scores few tokens.

        ``recent`` are among them.
        """
        head = get_flash_head(self._model) if self._scores_few else None
        if head is None:
            return nullcontext()
        tokens = mx.array(recent, mx.uint32)
        n_probes = policy_of(head).draft_probes

        def project(hidden: mx.array) -> mx.array:
            last = hidden[..., -1:, :]
            return head.draft_logits(last, tokens, n_probes=n_probes)

        return head.intercepted(project)


def draft_report(draft_model: Any) -> str:
    """What drafts, for a line under a text."""
    head = get_flash_head(draft_model)
    if head is None:
        return "a draft model without a FlashHead"
    probes = policy_of(head).draft_probes or head.n_probes
    return f"a draft model with FlashHead, {probes:,} of {head.n_clusters:,} clusters a draft"
