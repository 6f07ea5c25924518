"""When to check: by the risk that has gathered, the number of tokens and the time they wait."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from ..head.flash_head import FlashHead
from .check import Check
from .proposals import Proposer
from .text import Position, Text

MOST_SECONDS = 0.1
FEW = 4  # tokens that may wait longer, on a machine that is slow to compute them
MOST_READ = 64  # tokens that may wait while a check is computed


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
            if not self._proposer.check or (position.dense and text.n_read == 1):
                positions = [text.confirm() for _ in range(text.n_read)]
                if self._proposer.check:
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
