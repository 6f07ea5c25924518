"""The check: the dense rows over all waiting states at once, and what it confirms."""

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from ..head.draw import Draws
from ..head.flash_head import FlashHead
from ..models.finish import unchanged
from .products import SlotProduct
from .proposals import Proposer
from .random_state import current_random_state, random_state, set_random_state
from .rounding import rounding_of
from .screen import certain_best, certain_draw, certain_within
from .text import GREEDY, Position, Text

Row = tuple[Text, Position, int]  # a text, a position, its place in the text
Kind = tuple[bool, bool] | None


class Check:
    """A check of the first ``n`` waiting positions of some texts.

    It is launched when it is made, and read by :meth:`confirm`.

    Args:
        proposer: Whose proposals they are.
        counts: The texts, with the number of positions of each. Their tokens are known.
    """

    def __init__(self, proposer: Proposer, counts: Sequence[tuple[Text, int]]):
        self._proposer = proposer
        proposer.n_checks += 1
        assert proposer.head is not None
        assert proposer.finish is not None
        self._head: FlashHead = proposer.head
        self._finish = proposer.finish
        self._waits = proposer.in_step
        self._counts = [(text, n) for text, n in counts if n]
        self._rows = [
            (text, text.waiting[i], len(text.tokens) + i)
            for text, n in self._counts
            for i in range(n)
            if not text.waiting[i].dense
        ]
        self._product: SlotProduct | None = None
        self._certain: dict[Position, bool] = {}
        self._flags: list[tuple[list[Position], mx.array]] = []
        if self._rows:
            self._launch()

    @property
    def texts(self) -> list[Text]:
        """The texts."""
        return [text for text, _ in self._counts]

    @property
    def ready(self) -> bool:
        """Whether it is time to :meth:`confirm`: no thread is at work, or it is waited for."""
        return self._product is None or self._product.ready or self._waits

    def _launch(self) -> None:
        hidden = mx.concatenate([_hidden(position) for _, position, _ in self._rows])
        self._rounding = rounding_of(self._head, hidden.dtype)
        self._product = SlotProduct(self._head, hidden)
        if self._product.ready:
            self._screen()

    def _screen(self) -> None:
        """Judges the rows by the product, as soon as it is there."""
        assert self._product is not None
        slots, self._product = self._product.result(), None
        groups: dict[Kind, list[int]] = {}
        for i, (text, _, _) in enumerate(self._rows):
            groups.setdefault(self._kind(text), []).append(i)
        flags = []
        for kind, members in groups.items():
            rows = [self._rows[i] for i in members]
            chosen = slots if len(members) == len(self._rows) else slots[mx.array(members)]
            judge = self._by_logits if kind is None else self._by_rows
            flags.append(judge(rows, chosen))
            self._flags.append(([position for _, position, _ in rows], flags[-1]))
        self._note_logprobs(slots)
        mx.async_eval(flags)

    def _kind(self, text: Text) -> Kind:
        """Texts of one kind are screened together. None: by the logits of all tokens."""
        settings = text.settings
        if settings is None or text.processors or self._finish is not unchanged:
            return None
        return settings.greedy, settings.filters

    def _by_rows(self, rows: list[Row], slots: mx.array) -> mx.array:
        """For choices by the head's own logits alone: which are certain, (k,) bool."""
        positions = [position for _, position, _ in rows]
        probes = mx.concatenate([_row(position, "probes") for position in positions])
        scored = mx.concatenate([_row(position, "logits") for position in positions])
        tokens = mx.array([position.token for position in positions], dtype=mx.uint32)
        settings = [(text.settings or GREEDY, text.key(index)) for text, _, index in rows]
        head, rounding = self._head, self._rounding
        if settings[0][0].greedy:
            return certain_best(head, rounding, slots, probes, scored, tokens)
        draws, filters = Draws.of(settings), settings[0][0].filters
        return certain_draw(head, rounding, slots, probes, scored, tokens, draws, filters)

    def _by_logits(self, rows: list[Row], slots: mx.array) -> mx.array:
        """For choices that need the model's logits: which are certain, (k,) bool."""
        flags = []
        for i, (text, position, index) in enumerate(rows):
            logits = self._model_logits(slots[i : i + 1])
            room = self._rounding.batch * mx.max(mx.abs(logits).astype(mx.float32))
            processed = logits
            if text.processors:
                processed = text.process(text.context(index), mx.array(logits))
            if text.settings is None:
                flags.append(self._same_draw(text, position, index, processed))
                continue
            settings = text.settings
            draws = None if settings.greedy else Draws.of([(settings, text.key(index))])
            room = 2 * room if text.processors else room  # they at most double a distance
            epsilon = self._rounding.epsilon
            token = cast(int, position.token)
            flags.append(certain_within(processed, room, epsilon, token, draws))
        return mx.concatenate(flags)

    def _same_draw(self, text: Text, position: Position, index: int, logits: mx.array) -> mx.array:
        """Whether another's sampler, or a chain with XTC, draws the proposal again: (1,) bool."""
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        with random_state(position.random_state):
            return text.pick(logits, logprobs, index) == position.token

    def _model_logits(self, slots: mx.array) -> mx.array:
        """(k, C, n) in the order of the clusters → the model's logits (k, V)."""
        logits = mx.take(slots.reshape(len(slots), -1), self._head.clustered.slot_of, axis=-1)
        return self._finish(logits)

    def _note_logprobs(self, slots: mx.array) -> None:
        """Keeps log-probabilities where they are wanted. They are lazy, since few are read."""
        for i, (text, position, index) in enumerate(self._rows):
            if not text.logprobs:
                continue
            logits = self._model_logits(slots[i : i + 1])
            if text.processors:
                logits = text.process(text.context(index), mx.array(logits))
            position.logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]

    def confirm(self, text: Text) -> tuple[list[Position], bool]:
        """The text's positions that are sure now, and whether the last of them is another choice.

        Waits for the check. They become confirmed tokens. After another choice nothing waits any
        more, and the text goes on from there.
        """
        if self._product is not None:
            self._screen()
        for positions, flags in self._flags:
            self._certain.update(zip(positions, cast(list[bool], flags.tolist()), strict=True))
        self._flags = []
        n = dict(self._counts)[text]
        confirmed: list[Position] = []
        for _ in range(n):
            position = text.waiting[0]
            if not position.dense and not self._certain[position]:
                token, logprobs, after = self._settle(text, position)
                if text.logprobs:
                    position.logprobs = logprobs
                if token != position.token:
                    self._proposer.n_others += 1
                    position.token = token
                    text.confirm()
                    text.waiting.clear()
                    if position.random_state is not None:
                        set_random_state(after)
                    return [*confirmed, position], True
            confirmed.append(text.confirm())
        return confirmed, False

    def _settle(self, text: Text, position: Position) -> tuple[int, mx.array, mx.array]:
        """What the dense logits of this one position choose, and MLX's random state after it."""
        logits = self._finish(self._head.dense_logits(_hidden(position)))
        with random_state(position.random_state):
            token, logprobs = text.choose(logits, len(text.tokens))
            return cast(int, token.item()), logprobs, current_random_state()


def _hidden(position: Position) -> mx.array:
    assert position.step is not None
    return position.step.hidden[position.row : position.row + 1]


def _row(position: Position, name: str) -> mx.array:
    """The position's part of an array of its proposal."""
    assert position.step is not None
    array: mx.array = getattr(position.step.proposal, name)
    return array[position.row : position.row + 1]
