"""The start of a call within a text: its mark, and which tokens go on from it as a call does."""

from typing import Any

import numpy as np

from .grammar import ToolCalls
from .matchers import Run, keep
from .vocabulary import Vocabulary


class CallStart:
    """The mark that begins a section of calls, wherever it comes in a text.

    Args:
        vocabulary: The tokens.
        calls: What calls look like.
        section: A matcher of a section that has followed nothing, to be copied.

    Attributes:
        mark: The mark.
    """

    def __init__(self, vocabulary: Vocabulary, calls: ToolCalls, section: Any):
        self.mark = vocabulary.mark(calls.start)
        self._vocabulary = vocabulary
        self._calls = calls
        self._section = section
        self._wrong_tokens = self._known_wrong_tokens()

    @property
    def text_goes_on(self) -> bool:
        """Whether a section may have text after it."""
        return self._calls.several and self._calls.is_closed

    def section_after(self, length: int, token: int, *, is_whole: bool) -> Run | None:
        """The section of calls that a token begins.

        Args:
            length: Bytes of the mark before the token.
            token: A token that completes the mark.
            is_whole: Whether the token ends with the mark.

        Returns:
            None if the token goes on after the mark as no call does.
        """
        start = self._calls.start
        if is_whole:
            return self._section_from(start)
        n_before = dict(self.mark.overshooting(length))[token]
        run = self._section_from(start[: max(0, n_before)])
        return run if run.matcher.try_consume_tokens([token]) else None

    def free_mask(self, length: int) -> np.ndarray | None:
        """The mask of a free text, (⌈V/32⌉,) uint32; None if every token is allowed.

        It rules out tokens that complete the mark and go on as no call does.

        Args:
            length: Bytes of the mark with which the text ends.
        """
        wrong = self._wrong_tokens[length]
        return ~self._vocabulary.words(wrong) if wrong else None

    def _section_from(self, written: str) -> Run:
        """A section of which the beginning of the mark has been written."""
        matcher = self._section.deep_copy()
        matcher.consume_tokens(self._vocabulary.tokens.greedy_tokenize(written))
        return Run(matcher, "calls")

    def _known_wrong_tokens(self) -> dict[int, list[int]]:
        """The tokens of :meth:`_wrong_tokens_after` for each number of bytes.

        They are found before any text: the first time it takes seconds, in which no mask would
        come.
        """
        known = self._vocabulary.wrong_tokens
        key = self._calls.section.compiled
        if key not in known:
            lengths = range(len(self._calls.start.encode()))
            keep(known, key, {length: self._wrong_tokens_after(length) for length in lengths})
        return known[key]

    def _wrong_tokens_after(self, length: int) -> list[int]:
        """The tokens that complete the mark, after so many bytes of it, and go on wrongly."""
        masks: dict[int, np.ndarray] = {}
        wrong = []
        for token, n_before in self.mark.overshooting(length):
            if n_before < 0:
                wrong.append(token)
                continue
            if n_before not in masks:
                run = self._section_from(self._calls.start[:n_before])
                masks[n_before] = np.frombuffer(run.matcher.compute_bitmask(), np.uint32)
            if not masks[n_before][token // 32] >> (token % 32) & 1:
                wrong.append(token)
        return wrong
