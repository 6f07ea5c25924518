"""llguidance's matchers: made with limits, checked once, and called within a limit of time."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

from .grammar import FORM_OF_CALLS, Grammar
from .vocabulary import Vocabulary, llguidance

# Seconds of computing that all masks may take in addition to a limit for each.
CREDIT_SECONDS = 0.1
# Seconds in which one mask must be there, if masks have a limit. llguidance cannot be interrupted.
MASK_SECONDS = 0.5
# Matchers of a tokenizer that are kept for further texts of the same form.
MAX_MATCHERS = 16
# What llguidance may spend on a grammar of many tools at once, about 0.2 s.
LEXER_FUEL = 10_000_000
# Earley items of one mask. Large schemas need up to 10,000; the default of 50,000 takes seconds.
MAX_ITEMS = 10_000

Key = TypeVar("Key")
Value = TypeVar("Value")


class MaskTime:
    """The time that masks may take.

    Args:
        seconds_per_mask: Seconds of computing that a mask may take on average; infinity for any.
    """

    def __init__(self, seconds_per_mask: float):
        self.seconds_per_mask = seconds_per_mask
        self._left = CREDIT_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether masks have taken more than they may, or one has failed."""
        return self._left <= 0

    def renew(self) -> None:
        """Begins anew."""
        self._left = CREDIT_SECONDS

    def spend(self, compute: Callable[[], Any]) -> None:
        """Calls ``compute``; with a limit in a thread, which is left alone if it takes too long."""
        if math.isinf(self.seconds_per_mask):
            compute()
            return
        seconds: Future[float] = Future()

        def run() -> None:
            began = time.thread_time()
            try:
                compute()
                seconds.set_result(time.thread_time() - began)
            except BaseException as error:  # a panic in Rust is no Exception
                seconds.set_exception(error)

        Thread(target=run, name="mask", daemon=True).start()
        try:
            self._left += self.seconds_per_mask - seconds.result(MASK_SECONDS)
        except BaseException:
            self._left = -math.inf


def make_matcher(vocabulary: Vocabulary, grammar: Grammar) -> Any:
    """A matcher of a grammar that has followed nothing."""
    fuel = LEXER_FUEL if grammar.kind == FORM_OF_CALLS else None
    limits = llguidance().LLParserLimits(step_max_items=MAX_ITEMS, initial_lexer_fuel=fuel)
    make = llguidance().LLMatcher
    return make(vocabulary.tokens, grammar.compiled, log_level=0, limits=limits)


def checked_matcher(vocabulary: Vocabulary, grammar: Grammar, mask_time: MaskTime) -> Any:
    """A matcher whose first mask has been computed, in time. It is to be copied.

    Raises:
        ValueError: If no text has the form, or its first mask takes too much computing.
    """
    known = vocabulary.matchers
    key = grammar.compiled, MAX_ITEMS
    if key in known:
        return known[key]
    matcher = make_matcher(vocabulary, grammar)
    mask_time.spend(matcher.compute_bitmask)
    if mask_time.is_over or "Too many items" in matcher.get_error():
        raise ValueError(f"The {grammar.kind} is too ambiguous to be followed: simplify it.")
    if matcher.is_error():
        raise ValueError(f"No text fits the {grammar.kind}: check that it can end.")
    keep(known, key, matcher)
    return matcher


def keep(known: dict[Key, Value], key: Key, value: Value) -> None:
    """Keeps a value for further texts; the oldest ones leave."""
    while len(known) >= MAX_MATCHERS:
        known.pop(next(iter(known)), None)
    known[key] = value


@dataclass(eq=False)
class Run:
    """A matcher that follows the text from one place on, for as long as the text fits it."""

    matcher: Any
    kind: str  # "form", "calls" or "thought"
    n_matched: int = 0

    def take(self, token: int, n_before: int) -> bool:
        """Follows one more token. Whether the text still fits."""
        if self.n_matched != n_before or not self.matcher.try_consume_tokens([token]):
            return False
        self.n_matched += 1
        return True

    def rewind(self, n_tokens: int) -> None:
        """Goes back to that many tokens, if it has followed more."""
        if self.n_matched > n_tokens:
            self.matcher.rollback(self.n_matched - n_tokens)
            self.n_matched = n_tokens

    def copy(self) -> "Run":
        """Another run, with a matcher of its own."""
        return Run(self.matcher.deep_copy(), self.kind, self.n_matched)
