"""Follows a text token by token: what it is in, and which tokens may come next."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from .call_start import CallStart
from .matchers import Run
from .vocabulary import Mark, Vocabulary


class Mode(Enum):
    """What may come at a place of a text."""

    FREE = "anything, up to the mark of a call"
    THOUGHT = "anything, up to the end of the thought or the mark of a call"
    FORM = "the form of the whole text"
    CALL = "the rest of a section of calls"
    END = "the end of the text"


class Place(NamedTuple):
    """Where a text is after some tokens."""

    mode: Mode
    begin: int  # the number of tokens before those of the mode
    of_start: int = 0  # bytes of a call's mark that the text ends with
    of_end: int = 0  # bytes of the thought's end that it ends with
    stray: int | None = None  # the first token that the grammar does not allow

    @property
    def is_free(self) -> bool:
        """Whether anything may come, up to a mark."""
        return self.mode in (Mode.FREE, Mode.THOUGHT)


@dataclass(frozen=True)
class TextRules:
    """What a text may be.

    Attributes:
        vocabulary: The tokens.
        has_form: Whether the whole text has a form.
        forms: The forms that it may have, as runs to be copied.
        call_start: The start of calls within the text; None without tools.
        begins_in_thought: Whether the prompt has begun a thought.
        end_of_thought: The mark at the end of a thought; None without thoughts.
    """

    vocabulary: Vocabulary
    has_form: bool
    forms: Sequence[Run]
    call_start: CallStart | None
    begins_in_thought: bool
    end_of_thought: Mark | None


class TextFollower:
    """The places of one text, and the mask at the latest one.

    Attributes:
        mask: (⌈V/32⌉,) uint32, the tokens that may come next; None if every token is allowed.
    """

    def __init__(self, rules: TextRules):
        self.mask: np.ndarray | None = None
        self._rules = rules
        self._tokens: list[int] = []
        self._runs: dict[int, list[Run]] = {}  # by the number of tokens before them
        first = Place(Mode.THOUGHT, 0) if rules.begins_in_thought else self._enter_form(0)
        self._places = [first]

    @property
    def place(self) -> Place:
        """The latest place."""
        return self._places[-1]

    def error(self) -> str | None:
        """The error of a matcher; None if there is none."""
        for runs in self._runs.values():
            for run in runs:
                if run.matcher.is_error():
                    return run.matcher.get_error().splitlines()[0]
        return None

    def follow(self, tokens: list[int]) -> None:
        """Goes to the end of the text's tokens so far, and computes the mask there."""
        before = self._tokens
        n_both = min(len(before), len(tokens))
        shared = next((i for i in range(n_both) if before[i] != tokens[i]), n_both)
        self._rewind(shared)
        for token in tokens[shared:]:
            self._places.append(self._next_place(token))
            self._tokens.append(token)
        self.mask = self._mask_here()

    def _rewind(self, n_tokens: int) -> None:
        """Goes back to the place after so many tokens."""
        del self._tokens[n_tokens:]
        del self._places[n_tokens + 1 :]
        for begin in [begin for begin in self._runs if begin > n_tokens]:
            del self._runs[begin]
        for begin, runs in self._runs.items():
            for run in runs:
                run.rewind(n_tokens - begin)

    def _next_place(self, token: int) -> Place:
        """The place after one more token."""
        place = self.place
        call_start = self._rules.call_start
        text = b""
        if call_start is not None or place.mode is Mode.THOUGHT:
            text = self._rules.vocabulary.text_of(token)
        mark = None if call_start is None else call_start.mark
        of_start, start_end = _advanced(mark, place.of_start, text)
        if not place.is_free:
            return self._next_in_form(token, of_start)
        of_end = 0
        thought_end = None
        if place.mode is Mode.THOUGHT:
            of_end, thought_end = _advanced(self._rules.end_of_thought, place.of_end, text)
        if start_end is not None and (thought_end is None or start_end <= thought_end):
            return self._enter_call(token, is_whole=start_end == len(text))
        if thought_end is not None:
            return self._enter_form(len(self._places))
        return place._replace(of_start=of_start, of_end=of_end)

    def _next_in_form(self, token: int, of_start: int) -> Place:
        """The place after a token that a form or a section of calls must allow."""
        place = self.place
        n_before = len(self._places) - 1 - place.begin
        followed = [run for run in self._runs.get(place.begin, ()) if run.take(token, n_before)]
        if not followed:
            stray = token if place.stray is None else place.stray
            return place._replace(stray=stray, of_start=of_start)
        if any(run.kind == "thought" and run.matcher.is_stopped() for run in followed):
            return Place(Mode.THOUGHT, len(self._places))
        if place.mode is Mode.CALL and followed[0].matcher.is_stopped():
            assert self._rules.call_start is not None
            mode = Mode.FREE if self._rules.call_start.text_goes_on else Mode.END
            return Place(mode, len(self._places))
        return place._replace(of_start=of_start)

    def _enter_form(self, begin: int) -> Place:
        """The place where the text begins, perhaps after a thought."""
        if not self._rules.has_form:
            return Place(Mode.FREE, begin)
        # no thought follows another one
        forms = [form for form in self._rules.forms if begin == 0 or form.kind != "thought"]
        self._runs[begin] = [form.copy() for form in forms]
        return Place(Mode.FORM, begin)

    def _enter_call(self, token: int, *, is_whole: bool) -> Place:
        """The place after a token that completes the mark of a call, and may go on."""
        assert self._rules.call_start is not None
        begin = len(self._places)
        length = self.place.of_start
        section = self._rules.call_start.section_after(length, token, is_whole=is_whole)
        if section is None:
            return Place(Mode.CALL, begin, stray=token)
        self._runs[begin] = [section]
        return Place(Mode.CALL, begin)

    def _mask_here(self) -> np.ndarray | None:
        """The mask at the latest place, (⌈V/32⌉,) uint32; None if every token is allowed."""
        place = self.place
        call_start = self._rules.call_start
        if place.is_free:
            return None if call_start is None else call_start.free_mask(place.of_start)
        vocabulary = self._rules.vocabulary
        ends = vocabulary.words(vocabulary.end_tokens)
        if place.mode is Mode.END or place.stray is not None:
            return ends
        n_tokens = len(self._tokens) - place.begin
        masks = []
        for run in self._runs[place.begin]:
            if run.n_matched == n_tokens:
                stopped = run.matcher.is_stopped()
                mask = ends if stopped else np.frombuffer(run.matcher.compute_bitmask(), np.uint32)
                if run.kind == "form" and call_start is not None and not stopped:
                    # a call's mark in the midst of another text would be read as such
                    mask = mask & ~call_start.mark.completing(place.of_start)
                masks.append(mask)
        return np.bitwise_or.reduce(masks)


def _advanced(mark: Mark | None, length: int, text: bytes) -> tuple[int, int | None]:
    return (0, None) if mark is None else mark.advance(length, text)
