"""The check: the dense rows over all waiting states at once, what it confirms, when it comes."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx

from ..head.draw import Draws
from ..head.flash_head import FlashHead
from ..head.steps import Proposal
from ..models.logit_change import LogitChange, unchanged
from .proposals import Proposer
from .rounding import SlotProduct, rounding_of
from .screen import is_certain_best, is_certain_draw, is_certain_within
from .sequence import GREEDY, Position, Text, current_random_state, random_state, set_random_state

MOST_SECONDS = 0.1
FEW = 4  # tokens that may wait longer, on a machine that is slow to compute them
MOST_READ = 64  # tokens that may wait while a check is computed

Row = tuple[Text, Position, int]  # a text, a position, its place in the text


class Check:
    """A check of the positions whose tokens are known, launched when made, read by `confirm`."""

    def __init__(self, proposer: Proposer, texts: Sequence[Text]):
        self._proposer, self.texts = proposer, texts
        proposer.n_verifications += 1
        self._head = cast(FlashHead, proposer.head)
        self._change = cast(LogitChange, proposer.change)
        self._counts = {text: text.n_read for text in texts}
        self._rows = [
            (text, text.waiting[i], len(text.tokens) + i)
            for text, n in self._counts.items()
            for i in range(n)
            if not text.waiting[i].dense
        ]
        self._product: SlotProduct | None = None
        self._flags: list[tuple[list[Row], mx.array]] = []  # which rows are certain, lazy
        self._certain: dict[Position, bool] = {}
        if self._rows:
            hidden = mx.concatenate([position.proposed("hidden") for _, position, _ in self._rows])
            self._rounding = rounding_of(self._head, hidden.dtype)
            self._product = SlotProduct(self._head, hidden)
            if self._product.ready:
                self._screen()

    @property
    def ready(self) -> bool:
        """Whether it is time to :meth:`confirm`: no thread is at work, or it is waited for."""
        return self._product is None or self._product.ready or self._head.in_step

    def _screen(self) -> None:
        """Judges the rows by the product, as soon as it is there."""
        assert self._product is not None
        slots, self._product = self._product.result(), None
        groups: dict[tuple[bool, bool] | None, list[int]] = {}
        for i, (text, _, _) in enumerate(self._rows):
            groups.setdefault(self._kind(text), []).append(i)
        for kind, members in groups.items():
            rows = [self._rows[i] for i in members]
            chosen = slots if len(members) == len(self._rows) else slots[mx.array(members)]
            judge = self._by_logits if kind is None else self._by_rows
            self._flags.append((rows, judge(rows, chosen)))
        for i, (text, position, index) in enumerate(self._rows):
            if text.logprobs:  # lazy, since few are read
                logits = text.process(self._model_logits(slots[i : i + 1]), index)
                position.logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
        mx.async_eval([certain for _, certain in self._flags])

    def _kind(self, text: Text) -> tuple[bool, bool] | None:
        """Texts of one kind are screened together. None: by the logits of all tokens."""
        settings = text.settings
        if settings is None or text.processors or self._change is not unchanged:
            return None
        return settings.greedy, settings.filters

    def _by_rows(self, rows: list[Row], slots: mx.array) -> mx.array:
        """For choices by the head's own logits alone: which are certain, (k,) bool."""
        names = Proposal._fields[:-1]
        arrays = [[position.proposed(name) for _, position, _ in rows] for name in names]
        proposal = Proposal._make([*map(mx.concatenate, arrays), None])
        settings = [(text.settings or GREEDY, text.key(index)) for text, _, index in rows]
        of_rows = self._head, self._rounding, slots, proposal
        if settings[0][0].greedy:
            return is_certain_best(*of_rows)
        return is_certain_draw(*of_rows, Draws.of(settings))

    def _by_logits(self, rows: list[Row], slots: mx.array) -> mx.array:
        """For choices that need the model's logits: which are certain, (k,) bool."""
        flags = []
        for i, (text, position, index) in enumerate(rows):
            logits = self._model_logits(slots[i : i + 1])
            room = self._rounding.batch * mx.max(mx.abs(logits).astype(mx.float32))
            processed, settings = text.process(logits, index), text.settings
            if settings is None:  # another's sampler, or a chain with XTC, draws again
                logprobs = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
                with random_state(position.random_state):
                    flags.append(text.pick(processed, logprobs, index) == position.token)
                continue
            draws = None if settings.greedy else Draws.of([(settings, text.key(index))])
            room = 2 * room if text.processors else room  # they at most double a distance
            token = cast(int, position.token)
            flags.append(is_certain_within(processed, room, self._rounding.epsilon, token, draws))
        return mx.concatenate(flags)

    def _model_logits(self, slots: mx.array) -> mx.array:
        """(k, C, n) in the order of the clusters → the model's logits (k, V)."""
        logits = mx.take(slots.reshape(len(slots), -1), self._head.clustered.slot_of, axis=-1)
        return self._change(logits)

    def confirm(self, text: Text) -> list[Position]:
        """Waits for the verify and confirms the text's positions up to one with another choice,
        which makes the text `refused`. Nothing waits any more then."""
        if self._product is not None:
            self._screen()
        for rows, certain in self._flags:
            flags = cast(list[bool], certain.tolist())
            self._certain |= {row[1]: flag for row, flag in zip(rows, flags, strict=True)}
        self._flags = []
        confirmed: list[Position] = []
        while len(confirmed) < self._counts[text] and not text.refused:
            position = text.waiting[0]
            if not position.dense and not self._certain[position]:
                self._settle(text, position)
            confirmed.append(text.confirm())
        if text.refused:
            text.waiting.clear()
        return confirmed

    def _settle(self, text: Text, position: Position) -> None:
        """Decides by the dense logits of this one position."""
        logits = self._change(self._head.dense_logits(position.proposed("hidden")))
        with random_state(position.random_state):
            choice, logprobs = text.choose(logits, len(text.tokens))
            token, after = cast(int, choice.item()), current_random_state()
        if text.logprobs:
            position.logprobs = logprobs
        text.refused = token != position.token
        if text.refused:
            self._proposer.n_rejected += 1
            position.token = token
            if position.random_state is not None:
                set_random_state(after)


class Pace:
    """Has the tokens of some texts checked, and hands out what is sure. ``mark`` marks the caches
    of some texts as they are. The first checks come after 1, 2, 4, … tokens."""

    def __init__(self, proposer: Proposer, mark: Callable[[Sequence[Text]], Sequence[Any]]):
        self._proposer, self._mark = proposer, mark
        self._check: Check | None = None
        self._marks: Sequence[Any] = ()  # as of the check's launch
        self._limit = 1
        self._n, self._risk, self._since = 0, 0.0, 0.0  # of the tokens that wait for a launch

    def confirmed(
        self, texts: Sequence[Text], read: Sequence[Text]
    ) -> Iterator[tuple[Text, list[Position]]]:
        """After a step, which has given the texts in ``read`` a token: what is sure now. Whoever
        takes it lets a `refused` text go back, and clears what waits of one that has ended."""
        n_read = max((text.n_read for text in texts), default=0)
        if self._check is not None and (self._check.ready or n_read >= MOST_READ):
            yield from self._outcome()
        last = False
        for text in read:
            if not text.n_read:  # it has ended or gone back
                continue
            position = text.waiting[text.n_read - 1]
            if not self._proposer.verify or (position.dense and text.n_read == 1):
                positions = [text.confirm() for _ in range(text.n_read)]
                if self._proposer.verify:
                    (text.mark,) = self._mark([text])
                yield text, positions
                continue
            self._since = self._since if self._n else time.perf_counter()
            self._n, self._risk = self._n + 1, self._risk + position.risk
            n_tokens = len(text.tokens) + text.n_read
            last = last or position.token in self._head.eos_token_ids or n_tokens == text.limit
        if last and self._check is not None:
            yield from self._outcome()
        waiting = [text for text in texts if text.n_read]
        if waiting and self._check is None and (last or self._due):
            self._n, self._risk, self._limit = 0, 0.0, self._limit * 2
            self._check, self._marks = Check(self._proposer, waiting), self._mark(waiting)
            if last:  # waits, since the next step may be of no use
                yield from self._outcome()

    @property
    def _head(self) -> FlashHead:
        return cast(FlashHead, self._proposer.head)

    @property
    def _due(self) -> bool:
        head, waited = self._head, time.perf_counter() - self._since
        too_long = self._n >= FEW and waited >= MOST_SECONDS and not head.in_step
        too_many = self._n >= min(self._limit, head.most_waiting)
        return too_many or self._risk >= head.most_risk or too_long

    def _outcome(self) -> Iterator[tuple[Text, list[Position]]]:
        """Waits for the check. A text that goes on is marked as of the check's launch."""
        check, self._check = self._check, None
        assert check is not None
        for text, mark in zip(check.texts, self._marks, strict=True):
            if text.waiting:  # else it has ended meanwhile
                positions = check.confirm(text)
                refused = text.refused
                yield text, positions
                if not refused:
                    text.mark = mark
