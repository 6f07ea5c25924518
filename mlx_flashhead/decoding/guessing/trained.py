"""A drafter that was trained with its target: an MTP layer, or an assistant of Gemma 4.

It drafts from the target's own states, and its layer has a cache beside the target's. Each entry of
that is a pair: a state, and the token at the next place.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...models.compat.mlx_vlm import length_of_pairs
from ...models.drafter_in_text import DrafterInText
from ...models.install import get_flash_head
from ...models.trained_drafter import TrainedDrafter
from ...wide.step import MAX_WIDTH
from ..caches import Mark
from ..policy import policy_of
from ..sampling import normalized
from ..text import Text
from .depth import Shares
from .draft_model import LATEST, head_share
from .guesser import Guesser, LatestToken, Offer
from .known_pairs import keep, known_of

# Pairs that wait for the next drafts, at most.
WAITING = 64
# The last states, for a text that goes back.
HISTORY = 128


class TrainedDrafts(Guesser):
    """What a trained drafter guesses in one text.

    It draws as the target does, from its own logits. A FlashHead of the target scores few tokens
    for each draft, where the drafter has no head of its own.

    Args:
        drafter: The drafter.
        model: Its target.
        n_drafts: Tokens that it guesses at a time, at most.
        caches: Gives the target's caches, for a drafter that reads them. They may be others later.
        layers: The caches of the drafter's layers, from which it goes on; None: new ones.
    """

    wants_states = True

    def __init__(
        self,
        drafter: TrainedDrafter,
        model: nn.Module,
        n_drafts: int,
        caches: Callable[[], list[Any]],
        layers: list[Any] | None = None,
    ):
        self.name = drafter.name
        self._n_drafts = min(n_drafts, MAX_WIDTH - 1)
        self.caches = caches
        self._drafter = drafter
        known = known_of(drafter, model)
        self.known = known
        self._shares = Shares(known.shares)
        # The text, while drafts of it are made.
        self._text: Text | None = None
        self._head = get_flash_head(model)
        self._target = drafter.target(model)
        self._cost = drafter.cost(self._target, head_share(self._head))
        # The last tokens that were heard, and how many there were in all.
        self._tokens: list[int] = []
        self._n_heard = 0
        # The pairs of the states before this one are in the drafter's cache, but for gaps. Those
        # from ``_first`` on can be taken back: there is a mark before them.
        self._next = 0
        self._first = 0
        # The states from ``_next`` on, (n, D) each, and the last states, (1, D) each.
        self._waiting: list[mx.array] = []
        self._history: list[mx.array] = []
        # How many drafts of a step were right whose states are not heard yet.
        self._n_right: int | None = None
        # The same and its states, until the token is known that was chosen behind these drafts.
        self._judged: tuple[int, mx.array] | None = None
        self._in_text = DrafterInText(
            drafter, self._target, project=self._project, choose=self._choose, layers=layers
        )
        self._mark: Mark = self._in_text.mark()

    def hear(self, tokens: list[int], states: mx.array | None) -> None:
        """Keeps pairs until the next drafts are wanted. Many are read at once."""
        self._settle(tokens[0])
        self._tokens += tokens
        self._n_heard += len(tokens)
        if states is None:
            self._leave_gap()
        else:
            self._take(states)
        del self._tokens[:-LATEST]

    def take_back(self, n: int) -> None:
        """Takes the last tokens back, and their pairs."""
        self._settle(None)
        self._n_heard -= n
        del self._tokens[len(self._tokens) - n :]
        del self._history[max(0, len(self._history) - n) :]
        if not self._history:
            self._leave_gap()
            return
        # The state behind which another token comes now.
        latest = self._n_heard - 1
        if self._next > latest:
            self._mark.back_to(latest - self._first)
            self._next = latest
            self._waiting = self._history[-1:]
        else:
            self._waiting = [mx.concatenate(self._waiting)[: latest + 1 - self._next]]

    def offer(self, text: Text, latest: LatestToken) -> Offer | None:
        """As many drafts as it may make. None is made yet."""
        if not self._history or not self._n_drafts:
            return None
        chances = self._shares.chances[: self._n_drafts]
        return Offer(self, chances, lambda n: self._drafts(text, latest, n), self._cost)

    def judge(self, n: int, n_right: int) -> None:
        """Learns how often drafts are right. The pairs of wrong ones will be taken back."""
        self._shares.note(n, n_right)
        self._n_right = n_right

    def leave(self) -> None:
        """Leaves in the drafter's cache the pairs of what was heard."""
        self._settle(None)
        self._read_waiting()
        keep(self._drafter, self._target.model, self._shares)

    def _take(self, states: mx.array) -> None:
        """Takes the states (n, D) of the last tokens."""
        last = states[-HISTORY:]
        self._history += mx.split(last, len(last))
        del self._history[:-HISTORY]
        if self._n_right is not None:
            self._judged = self._n_right, states
            self._n_right = None
            return
        self._waiting.append(states)
        if self._n_heard - self._next > WAITING:
            self._read_waiting()
            mx.async_eval([layer.state for layer in self._in_text.layers])

    def _read_waiting(self) -> None:
        """Reads the pairs that wait, but for that of the latest state."""
        n_pairs = self._n_heard - 1 - self._next
        if n_pairs > 0 and self._waiting:
            states = mx.concatenate(self._waiting)
            self._in_text.read(mx.array(self._tokens[-n_pairs:], mx.uint32), states[:-1])
            self._waiting = [states[-1:]]
            self._next += n_pairs

    def _leave_gap(self) -> None:
        """Goes on over states that are not known: the pairs of these are left out."""
        if self._n_right is not None:
            self._in_text.forget_drafts()
            self._n_right = None
        self._next = self._n_heard
        self._first = self._n_heard
        self._mark = self._in_text.mark()
        self._waiting = []
        self._history = []

    def _settle(self, token: int | None, place: int | None = None) -> None:
        """Keeps the pairs of drafts that were right, and reads on with the target's states.

        Args:
            token: What was chosen behind them, if it is known.
            place: The text's place behind that, if it is drafted next.
        """
        if self._judged is None:
            return
        n_right, states = self._judged
        self._judged = None
        self._in_text.accept(n_right, states, token, place)
        self._next = self._n_heard
        if token is None:
            self._next -= 1
            self._waiting = self._history[-1:]

    def _drafts(self, text: Text, latest: LatestToken, n: int) -> mx.array:
        """Drafts ``n`` tokens, (n,) uint32, lazy, behind the latest one."""
        self._text = text
        place = text.n_chosen
        if self._judged is not None:
            self._settle(latest.read(), place)
        if self._waiting:
            n_pairs = self._n_heard - 1 - self._next
            known = self._tokens[len(self._tokens) - n_pairs :]
            tokens = mx.concatenate([mx.array(known, mx.uint32), latest.array.astype(mx.uint32)])
            self._in_text.read(tokens, mx.concatenate(self._waiting), place)
            self._waiting = []
            self._next = self._n_heard
        drafts = self._in_text.draft(
            latest.array, self._history[-1], n, place, self.caches(), greedy=text.greedy
        )
        self._text = None
        return drafts

    def _choose(self, logits: mx.array, place: int | None) -> mx.array:
        """Chooses a token (1,) from logits (1, V), as the text does at this place."""
        # Nobody reads such a token.
        if self._text is None or place is None:
            return mx.argmax(logits, axis=-1)
        return self._text.pick(logits, normalized(logits), place)

    def _project(self, hidden: mx.array) -> mx.array:
        """The logits (1, L, V) of states (1, L, D), by few clusters where there is a FlashHead."""
        if self._head is None:
            return self._target.dense_logits(hidden)
        tokens = mx.array(sorted(set(self._tokens)), mx.uint32)
        return self._head.draft_logits(hidden, tokens, n_probes=policy_of(self._head).draft_probes)


def trained_drafts(
    drafter: TrainedDrafter,
    model: nn.Module,
    n_drafts: int,
    caches: list[Any],
    layers: list[Any],
    n_held: int,
) -> TrainedDrafts:
    """What a trained drafter guesses in a text that decodes alone.

    Args:
        drafter: The drafter.
        model: Its target.
        n_drafts: Tokens that it guesses at a time, at most.
        caches: The target's, which may change.
        layers: The caches of the drafter's layers, which a caller keeps with those; empty where it
            keeps none.
        n_held: Tokens that the target's caches hold.
    """
    # No pair is beyond the text.
    for layer in layers:
        n_beyond = length_of_pairs(layer) - max(0, n_held - 1)
        if n_beyond > 0:
            layer.trim(n_beyond)
    return TrainedDrafts(drafter, model, n_drafts, lambda: caches, layers or None)


def drafter_report(drafter: TrainedDrafter, model: nn.Module) -> str:
    """What drafts, for a line under a text."""
    head = get_flash_head(model)
    if drafter.has_own_head:
        return f"{drafter.name} with a head of its own"
    if head is None:
        return f"{drafter.name} with the model's normal (dense) head"
    probes = policy_of(head).draft_probes or head.n_probes
    return f"{drafter.name} with FlashHead, {probes:,} of {head.n_clusters:,} clusters a draft"
