"""How a program under `mlx_flashhead.run` decodes its texts: what is said of it, and counted."""

import atexit
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from threading import local
from typing import Any
from weakref import ref

import mlx.core as mx

from ..decoding.proposer import FIRST, PAUSED
from ..head.flash_head import FlashHead
from .head_options import HeadOptions

OWN_STEPS = 4  # a prompt's last token is a step, too, and a loop of ours may follow
DENSE_LOOP = (
    "dense: this program's loop cannot be verified; --no-verify uses FlashHead's own choices"
)

# Takes how the next token of a text was decoded: "verified", FIRST, or "dense: " and why.
Announce = Callable[[str], Any]
_kept: list["Use"] = []  # those that print a line at the end of the process


class Use:
    """How a program decodes with a FlashHead. It says so in a line, once for each way.

    Args:
        name: The model's.
        options: With ``check``, a last line has the numbers of tokens.
        head: The FlashHead; a copy of it has a ``Use`` of its own.
    """

    def __init__(self, name: str, options: HeadOptions, head: FlashHead):
        self.name = name
        self._say = options.say
        self._verify = options.verify
        self._head = ref(head)
        self._n_steps = 0  # of a loop that is not ours
        self._local = local()  # of a thread: whether its tokens are announced
        self._said: set[str] = set()
        self._n_tokens: Counter[str] = Counter()
        if not options.verify:
            self._tell("unverified")
        if options.check:
            _print_at_end(self)

    def is_of(self, head: FlashHead) -> bool:
        """Whether this is about ``head`` itself, and not a copy of it."""
        return self._head() is head

    def announce(self, mode: str) -> None:
        """Counts a token, and says how it was decoded, if it was not said yet."""
        self._n_tokens[mode] += 1
        if mode not in (FIRST, PAUSED):
            self._tell(mode)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """A block in which a loop decodes whose tokens are announced, though it is not ours."""
        before = getattr(self._local, "announced", False)
        self._local.announced = True
        try:
            yield
        finally:
            self._local.announced = before

    def follow(
        self, steps: Generator[Any, None, None], mode: str = ""
    ) -> Generator[Any, None, None]:
        """The tokens of a loop, decoded in the way ``mode``, or announced by the loop itself."""
        with closing(steps):
            while True:
                with self.announcing():  # a token at a time, since loops may take turns
                    step = next(steps, None)
                if step is None:
                    return
                if mode:
                    self.announce(mode)
                yield step

    def project(self, head: FlashHead, hidden: mx.array) -> mx.array:
        """The logits of a call that none of our loops has made."""
        if hidden.shape[-2:-1] == (1,):
            n_rows = hidden.size // hidden.shape[-1]
            if not self._verify:
                self._n_tokens["unverified"] += n_rows
                return head.unverified_logits(hidden)
            if not getattr(self._local, "announced", False):
                self._n_steps += 1
                self._n_tokens[DENSE_LOOP] += n_rows
                if self._n_steps == OWN_STEPS:
                    self._tell(DENSE_LOOP)
        return head.dense_logits(hidden)

    def summary(self) -> str:
        """The numbers of tokens in a sentence: verified, the first of texts, others by reasons."""
        counts = self._n_tokens
        n_all = counts.total()
        if not n_all:
            return f"Checked {self.name}: no tokens."
        parts = [f"{counts['verified']:,} verified ({counts['verified'] / n_all:.0%})"]
        if counts[FIRST]:
            parts.append(f"{counts[FIRST]:,} the first of their texts, by their prompts")
        others = [(n, mode) for mode, n in counts.items() if mode not in ("verified", FIRST)]
        parts += [f"{n:,} {mode}" for n, mode in sorted(others, reverse=True)]
        return f"Checked {self.name}: {n_all:,} tokens: {'; '.join(parts)}."

    def _tell(self, mode: str) -> None:
        if mode not in self._said:
            self._said.add(mode)
            self._say(f"Text of {self.name}: {mode}.")


def _print_at_end(use: Use) -> None:
    """Has a line printed when this process ends, or, as a child of multiprocessing, returns."""
    if not _kept:
        if parent_process() is None:
            atexit.register(_print_all)
        else:
            Finalize(None, _print_all, exitpriority=0)
    _kept.append(use)


def _print_all() -> None:
    while _kept:
        print(_kept.pop(0).summary(), file=sys.stderr, flush=True)
