"""A draft model: a smaller model with the same tokens, which guesses what the target will choose.

Its own rounding is of no matter: the target's wide step decides.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ...head.flash_head import FlashHead
from ...models.install import get_flash_head
from ...models.step_bytes import step_bytes_of
from ...wide.step import MAX_WIDTH
from ..caches import OwnCaches, TextMark
from ..policy import MAX_PENDING, policy_of
from ..sampling import normalized
from ..text import Text
from .depth import Shares
from .guesser import Guesser, LatestToken, Offer
from .known_pairs import keep, known_of

# Tokens of a text that a draft model's FlashHead always scores.
LATEST = 256
# Tokens that are read at once.
STEP_SIZE = 2048
# A text goes back by its pending tokens at most, and those of a wide step.
MOST_BACK = MAX_PENDING + MAX_WIDTH
# Tokens between marks, whose copies of layers that cannot be trimmed take memory.
MARKED = 16


class DraftModel(Guesser):
    """A draft model in one text.

    It draws as the target does, from its own logits: the same number, or the same noise. Models of
    one family may have some tokens more or less at the end of their vocabularies.

    Args:
        draft_model: The draft model, with a FlashHead or without. That scores few tokens for a
            draft, unless the target drafts for itself.
        target: The model of the text.
        layers: The draft model's caches.
        n_drafts: Tokens that it guesses at a time, at most.
        n_held: How many of the tokens that it will hear the caches hold already.
    """

    name = "draft model"

    def __init__(
        self,
        draft_model: nn.Module,
        target: nn.Module,
        layers: list[Any],
        n_drafts: int,
        n_held: int = 0,
    ):
        self._n_drafts = min(n_drafts, MAX_WIDTH - 1)
        self._model: Any = draft_model
        self._target = target
        self._layers = layers
        # The tokens of its vocabulary, by logits of which nothing is computed.
        self._n_tokens: int = self._model(mx.zeros((1, 1), mx.uint32)).shape[-1]
        known = known_of(draft_model, target)
        self.known = known
        self._shares = Shares(known.shares)
        self._cost = draft_cost(draft_model, target)
        # The last tokens that were heard, and those of them that the caches do not hold yet.
        self._recent: list[int] = []
        self._waiting: list[int] = []
        # Tokens in the caches that have not been heard yet.
        self._n_ahead = n_held
        self._caches = OwnCaches(layers, self._logits)
        # Tokens that were fed and are the text's, and (1,) each those whose drafts are not judged.
        self._read: list[int] = []
        self._unjudged: list[mx.array] = []
        # Those to which the text may go back, and the one before the drafts that are not judged.
        self._marks: list[TextMark] = self._caches.marks([self])
        self._mark: TextMark | None = None

    @property
    def n_cached(self) -> int:
        """Tokens that were fed."""
        return len(self._read) + len(self._unjudged)

    @property
    def fed(self) -> list[int]:
        """These tokens."""
        if not self._unjudged:
            return self._read
        return self._read + cast(list[int], mx.concatenate(self._unjudged).tolist())

    def hear(self, tokens: list[int], states: mx.array | None) -> None:
        """Keeps tokens until the next drafts are wanted, but for those that the caches hold."""
        self._recent = [*self._recent, *tokens][-LATEST:]
        n_held = min(self._n_ahead, len(tokens))
        self._n_ahead -= n_held
        self._waiting += tokens[n_held:]

    def take_back(self, n: int) -> None:
        """Takes tokens back. Caches that cannot be trimmed go back to a mark, and read again."""
        del self._recent[len(self._recent) - n :]
        n_waiting = min(n, len(self._waiting))
        del self._waiting[len(self._waiting) - n_waiting :]
        if n > n_waiting:
            self._go_back(len(self._read) - (n - n_waiting))

    def offer(self, text: Text, latest: LatestToken) -> Offer | None:
        """As many drafts as it may make. None is made yet."""
        if not self._n_drafts:
            return None
        chances = self._shares.chances[: self._n_drafts]
        return Offer(self, chances, lambda n: self._drafts(latest.array, n, text), self._cost)

    def judge(self, n: int, n_right: int) -> None:
        """Takes back all drafts but those that were right."""
        self._shares.note(n, n_right)
        # The last draft was not fed.
        self._n_ahead = min(1 + n_right, n)
        if self._mark is not None:
            fed = cast(list[int], mx.concatenate(self._unjudged).tolist())
            self._mark.back_to(self._n_ahead)
            self._read += fed[: self._n_ahead]
            self._unjudged = []
            self._mark = None

    def leave(self) -> None:
        """Leaves in the caches what was heard."""
        self._read_waiting()
        keep(self._model, self._target, self._shares)

    def _read_waiting(self) -> None:
        """Feeds the tokens that the caches do not hold yet, many at a time."""
        waiting = self._waiting
        self._waiting = []
        n_first = max(0, len(waiting) - MOST_BACK)
        for start in range(0, n_first, STEP_SIZE):
            self._feed(waiting[start : min(start + STEP_SIZE, n_first)])
            mx.eval([layer.state for layer in self._layers])
        if n_first:
            self._marks = self._caches.marks([self])
        if waiting[n_first:]:
            self._feed(waiting[n_first:])

    def _feed(self, tokens: list[int]) -> None:
        self._logits(mx.array([tokens], mx.uint32), self._layers)
        self._read += tokens

    def _go_back(self, n_tokens: int) -> None:
        """Goes back to the first ``n_tokens`` that were fed. What is not held then waits."""
        while len(self._marks) > 1 and self._marks[-1].n_tokens > n_tokens:
            self._marks.pop()
        mark = self._marks[-1]
        n_since = max(0, n_tokens - mark.n_tokens)
        if mark.trims_all:
            mark.back_to(n_since)
        else:
            mark.back_to(0)
            self._waiting = self._read[mark.n_tokens : n_tokens]
            n_since = 0
        del self._read[mark.n_tokens + n_since :]

    def _marked(self) -> TextMark:
        """A mark at the tokens that the caches hold. It is kept where others are too far back."""
        (mark,) = self._caches.marks([self])
        marks = self._marks
        if mark.n_tokens - marks[-1].n_tokens >= MARKED:
            marks.append(mark)
        while len(marks) > 1 and marks[1].n_tokens <= mark.n_tokens - MOST_BACK:
            del marks[0]
        return mark

    def _drafts(self, latest: mx.array, n: int, text: Text) -> mx.array:
        """Guesses ``n`` tokens, (n,) uint32, lazy, behind the ``latest`` one (1,)."""
        recent = sorted({token for token in self._recent if token < self._n_tokens})
        vocab_size = text.vocab_size
        n_common = min(self._n_tokens, vocab_size)
        with self._scoring(recent):
            self._read_waiting()
            self._mark = self._marked()
            drafts = [latest.astype(mx.uint32)]
            for i in range(n):
                self._unjudged.append(drafts[-1])
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
        if head is None or self._model is self._target:
            return nullcontext()
        tokens = mx.array(recent, mx.uint32)
        n_probes = policy_of(head).draft_probes

        def project(hidden: mx.array) -> mx.array:
            last = hidden[..., -1:, :]
            return head.draft_logits(last, tokens, n_probes=n_probes)

        return head.intercepted(project)


def draft_cost(draft_model: nn.Module, target: nn.Module) -> float:
    """Estimates the time of a draft, relative to a step of its target, by the bytes of both.

    A draft is a step of the draft model, whose FlashHead scores few tokens.
    """
    if draft_model is target:
        return 1.0
    nbytes = step_bytes_of(draft_model).all(head_share(get_flash_head(draft_model)))
    return nbytes / step_bytes_of(target).all()


def head_share(head: FlashHead | None) -> float:
    """The share of a head that a draft reads, by the clusters that are scored."""
    if head is None:
        return 1.0
    n_probes = policy_of(head).draft_probes or head.n_probes
    share: float = n_probes / head.n_clusters
    return share


def draft_report(draft_model: nn.Module) -> str:
    """What drafts, for a line under a text."""
    head = get_flash_head(draft_model)
    if head is None:
        return "a draft model without a FlashHead"
    probes = policy_of(head).draft_probes or head.n_probes
    return f"a draft model with FlashHead, {probes:,} of {head.n_clusters:,} clusters a draft"
