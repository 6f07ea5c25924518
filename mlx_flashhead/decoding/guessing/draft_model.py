"""A draft model: a smaller model with the same tokens, which guesses what the target will choose.

Its own rounding is of no matter: the target's wide step decides.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...models.install import get_flash_head
from ...wide.step import MAX_WIDTH
from ..caches import Mark, OwnCaches, trims
from ..policy import policy_of
from ..sampler import normalized
from .guesser import Guesser, LatestToken, Offer
from .worth import Worth

if TYPE_CHECKING:
    from ..text import Text

# How often its drafts are right, before any was made.
EXPECTED = 0.6
# Tokens of a text that a draft model's FlashHead always scores.
LATEST = 256
# Tokens that are read at once.
STEP_SIZE = 2048


class DraftModel(Guesser):
    """A draft model in one text.

    It draws as the target does, from its own logits: the same number, or the same noise. Models of
    one family may have some tokens more or less at the end of their vocabularies.

    Args:
        model: The draft model, with a FlashHead or without.
        layers: Its caches.
        n_drafts: Tokens that it guesses at a time, at most.
        n_held: How many of the tokens that it will hear the caches hold already.
        scores_few: Whether its FlashHead, if it has one, scores few tokens; not where the target
            drafts for itself.
    """

    name = "draft model"
    instead = True
    always = True

    def __init__(
        self,
        model: nn.Module,
        layers: list[Any],
        n_drafts: int,
        n_held: int = 0,
        *,
        scores_few: bool = True,
    ):
        self._n_drafts = min(n_drafts, MAX_WIDTH - 1)
        self._model: Any = model
        self._layers = layers
        self._scores_few = scores_few
        # The tokens of its vocabulary, by logits of which nothing is computed.
        self._n_tokens: int = self._model(mx.zeros((1, 1), mx.uint32)).shape[-1]
        self._worth = Worth(EXPECTED)
        # The last tokens that were heard, and those of them that the caches do not hold yet.
        self._recent: list[int] = []
        self._waiting: list[int] = []
        # Tokens in the caches that have not been heard yet.
        self._n_ahead = n_held
        self._caches = OwnCaches(layers, self._logits)
        # Tokens (1,) that were fed since the mark before the drafts that are not judged yet.
        self._fed: list[mx.array] = []
        self._mark: Mark | None = None

    @property
    def n_cached(self) -> int:
        """Tokens that were fed since the latest mark."""
        return len(self._fed)

    @property
    def fed(self) -> list[int]:
        """These tokens."""
        return cast(list[int], mx.concatenate(self._fed).tolist())

    def hear(self, tokens: list[int], states: mx.array | None) -> None:
        """Keeps tokens until the next drafts are wanted, but for those that the caches hold."""
        self._recent = [*self._recent, *tokens][-LATEST:]
        n_held = min(self._n_ahead, len(tokens))
        self._n_ahead -= n_held
        self._waiting += tokens[n_held:]

    def take_back(self, n: int) -> None:
        """Takes tokens back. Caches that cannot be trimmed keep them, and drafts are worse then."""
        del self._recent[len(self._recent) - n :]
        n_waiting = min(n, len(self._waiting))
        del self._waiting[len(self._waiting) - n_waiting :]
        for layer in self._layers:
            if trims(layer):
                layer.trim(n - n_waiting)

    def offer(self, text: "Text", latest: LatestToken) -> Offer | None:
        """As many drafts as it may make. None is made yet."""
        if not self._n_drafts:
            return None
        chances = self._worth.chances(self._n_drafts)
        return Offer(self, chances, lambda n: self._drafts(latest.array, n, text))

    def judge(self, n: int, n_right: int) -> None:
        """Takes back all drafts but those that were right."""
        self._worth.note(n_right, n_right < n)
        # The last draft was not fed.
        self._n_ahead = min(1 + n_right, n)
        if self._mark is not None:
            self._mark.back_to(self._n_ahead)
            self._mark = None

    def leave(self) -> None:
        """Leaves in the caches what was heard.

        Those that cannot be trimmed may hold a few tokens more. The next text's drafts are worse
        then, and the text is the same.
        """
        self._read()

    def _read(self) -> None:
        """Feeds the tokens that the caches do not hold yet, many at a time."""
        while len(self._waiting) > STEP_SIZE:
            self._logits(mx.array([self._waiting[:STEP_SIZE]], mx.uint32), self._layers)
            mx.eval([layer.state for layer in self._layers])
            del self._waiting[:STEP_SIZE]
        if self._waiting:
            self._logits(mx.array([self._waiting], mx.uint32), self._layers)
            self._waiting = []

    def _drafts(self, latest: mx.array, n: int, text: "Text") -> mx.array:
        """Guesses ``n`` tokens, (n,) uint32, lazy, behind the ``latest`` one (1,)."""
        recent = sorted({token for token in self._recent if token < self._n_tokens})
        vocab_size = text.vocab_size
        n_common = min(self._n_tokens, vocab_size)
        with self._scoring(recent):
            self._read()
            self._fed = []
            self._mark = self._caches.marks([self])[0]
            drafts = [latest.astype(mx.uint32)]
            for i in range(n):
                self._fed.append(drafts[-1])
                logits = self._logits(drafts[-1][None], self._layers)[:, -1, :n_common]
                # As many as the target has: top-k may be more than its own vocabulary.
                logits = mx.pad(
                    logits,
                    [(0, 0), (0, vocab_size - n_common)],
                    constant_values=-mx.inf,
                )
                place = text.n_chosen + i
                drafts.append(text.pick(logits, normalized(logits), place).astype(mx.uint32))
        return mx.concatenate(drafts[1:])

    def _logits(self, tokens: mx.array, layers: list[Any]) -> mx.array:
        """Feeds tokens (1, n). Returns the logits (1, n, V) after them, lazy."""
        tokens = mx.minimum(tokens, self._n_tokens - 1)
        return cast(mx.array, self._model(tokens, cache=layers))

    def _scoring(self, recent: list[int]) -> AbstractContextManager[None]:
        """A block in which the model's FlashHead, if it has one, scores few tokens.

        ``recent`` are among them.
        """
        head = get_flash_head(self._model)
        if head is None or not self._scores_few:
            return nullcontext()
        tokens = mx.array(recent, mx.uint32)
        n_probes = policy_of(head).draft_probes

        def project(hidden: mx.array) -> mx.array:
            last = hidden[..., -1:, :]
            return head.draft_logits(last, tokens, n_probes=n_probes)

        return head.intercepted(project)


def draft_report(draft_model: nn.Module) -> str:
    """What drafts, for a line under a text."""
    head = get_flash_head(draft_model)
    if head is None:
        return "a draft model without a FlashHead"
    probes = policy_of(head).draft_probes or head.n_probes
    return f"a draft model with FlashHead, {probes:,} of {head.n_clusters:,} clusters a draft"
