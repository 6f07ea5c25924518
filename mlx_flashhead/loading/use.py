"""How a program under `mlx_flashhead.run` decodes its texts: what is said of it, and counted."""

import atexit
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..decoding.phase import FIRST, PAUSED, UNVERIFIED, VERIFIED, Mode
from ..decoding.policy import decoding_mode, policy_of
from ..head.flash_head import FlashHead
from ..models.install import get_flash_head
from ..models.trained_drafter import TrainedDrafter
from .head_options import HeadOptions

# For so long a program must have written nothing before a part of a build is done.
QUIET_SECONDS = 0.5
# At this step a loop is taken for the program's own. A prompt's last token is a step, too, and a
# loop of ours may follow it.
OWN_STEPS = 4
DENSE_LOOP = Mode.dense(
    "this program's loop cannot be verified; --no-verify uses FlashHead's own choices"
)
BUILDING = Mode.dense("its FlashHead is being built")

# Those of this process.
_all: list["Use"] = []


class Use:
    """How a program decodes with a model. It says so in a line, once for each way.

    A line stands before an answer: where a text is decoded otherwise from some token on, a terminal
    gets it before the next text, or when the process ends.

    Args:
        name: The model's.
        options: With ``check``, a last line has the numbers of tokens.
        drafter: Guesses the tokens of texts that decode alone.

    Attributes:
        lookup: When the next tokens of a text are looked up.
        n_drafts: The most tokens of a guess.
        used_at: When the program has last used the model, by ``time.monotonic``.
        _n_steps: Steps of loops that are not ours.
        _local: Of a thread: whether its tokens are announced, and whether a text begins.
        _begun: Whether an answer may be on the screen.
        _later: What is to be said before the next text.
    """

    def __init__(self, name: str, options: HeadOptions, drafter: TrainedDrafter | None = None):
        self.name = name
        self.lookup = options.lookup
        self.drafter = drafter
        self.n_drafts = options.num_draft_tokens
        self.used_at = time.monotonic()
        self._options = options
        self._n_steps = 0
        self._local = threading.local()
        self._begun = False
        self._said = {PAUSED}
        self._later: list[str] = []
        self._n_tokens: Counter[Mode] = Counter()
        _all.append(self)
        if parent_process() is None:
            atexit.register(self.say_the_rest)
        else:
            # A child of multiprocessing ends without atexit.
            Finalize(None, self.say_the_rest, exitpriority=0)

    @property
    def is_quiet(self) -> bool:
        """Whether the program has written nothing for a while."""
        return time.monotonic() - self.used_at > QUIET_SECONDS

    def mode_of(self, model: nn.Module) -> Mode:
        """What decodes the model's text."""
        if get_flash_head(model) is None:
            return BUILDING
        return decoding_mode(model)

    def take(self, head: FlashHead) -> None:
        """From now on the model has this FlashHead, whose calls come here."""
        # That the model stays dense is said with the first text.
        if not policy_of(head).dense:
            clusters = f"{head.n_probes:,} of {head.n_clusters:,} clusters"
            self._options.say(f"With FlashHead: {self.name}, {clusters} scored per token.")
        head.projection = self.project
        if not self._options.verify:
            self._tell(UNVERIFIED)

    def begin(self) -> None:
        """A text begins in this thread: what is said with its first token stands before it."""
        self._local.begins = True
        self._begun = True
        self._say_later()

    def announce(self, mode: Mode) -> None:
        """Counts a token, and says how it was decoded, if it was not said yet."""
        self._n_tokens[mode] += 1
        begins = getattr(self._local, "begins", False)
        self._local.begins = False
        if mode == FIRST:
            mode = VERIFIED
        if mode not in self._said:
            self._tell(mode, begins=begins)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """A block in which a loop decodes whose tokens are announced, though it is not ours."""
        before = getattr(self._local, "announced", False)
        self._local.announced = True
        try:
            yield
        finally:
            self._local.announced = before
            self.used_at = time.monotonic()

    def follow(
        self, tokens: Generator[Any, None, None], mode: Mode | None = None
    ) -> Generator[Any, None, None]:
        """The tokens of a loop, decoded in the way ``mode``, or announced by the loop itself."""
        with closing(tokens):
            while True:
                # A token at a time, since loops may take turns.
                with self.announcing():
                    token = next(tokens, None)
                if token is None:
                    return
                if mode is not None:
                    self.announce(mode)
                yield token

    def project(self, head: FlashHead, hidden: mx.array) -> mx.array:
        """The logits of a call that none of our loops has made."""
        is_prompt = hidden.shape[-2:-1] != (1,)
        if is_prompt:
            self._begun = True
            self._say_later()
            return head.dense_logits(hidden)
        n_rows = hidden.size // hidden.shape[-1]
        if not self._options.verify:
            self._n_tokens[UNVERIFIED] += n_rows
            return head.unverified_logits(hidden)
        if not getattr(self._local, "announced", False):
            self._n_steps += 1
            self._n_tokens[DENSE_LOOP] += n_rows
            if self._n_steps == OWN_STEPS:
                self._tell(DENSE_LOOP, begins=False)
        return head.dense_logits(hidden)

    def say(self, line: str, *, at_once: bool = False) -> None:
        """Says a line: on a terminal, where an answer may be, before the next text."""
        if at_once or not self._begun or not sys.stderr.isatty():
            self._options.say(line)
        else:
            self._later.append(line)

    def _tell(self, mode: Mode, *, begins: bool = True) -> None:
        self._said.add(mode)
        self.say(f"Text of {self.name}: {mode}.", at_once=begins)

    def _say_later(self) -> None:
        while self._later:
            self._options.say(self._later.pop(0))

    def say_the_rest(self) -> None:
        """Says what is to be said when this process ends."""
        self._say_later()
        if self._options.check:
            print(self.summary(), file=sys.stderr, flush=True)

    def summary(self) -> str:
        """The numbers of tokens in a sentence: verified, the first of texts, others by reasons."""
        counts = self._n_tokens
        n_all = counts.total()
        if not n_all:
            return f"Checked {self.name}: no tokens."
        parts = [f"{counts[VERIFIED]:,} verified ({counts[VERIFIED] / n_all:.0%})"]
        if counts[FIRST]:
            parts.append(f"{counts[FIRST]:,} the first of their texts, by their prompts")
        others = [(n, mode.words) for mode, n in counts.items() if not mode.is_verified]
        parts += [f"{n:,} {words}" for n, words in sorted(others, reverse=True)]
        return f"Checked {self.name}: {n_all:,} tokens: {'; '.join(parts)}."


def check_before_sigterm() -> None:
    """From now on SIGTERM ends this process as usual, but after its numbers of tokens are said.

    A program that handles it itself keeps its handler, and its exit says them.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _check_and_end)


def _check_and_end(number: int, frame: FrameType | None) -> None:
    lines = "".join(f"{use.summary()}\n" for use in _all)
    # Python's own buffers may be in use where the signal came.
    os.write(2, lines.encode())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
