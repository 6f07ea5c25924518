"""llguidance's matchers: made and called within limits."""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .grammar import LIMITS, sentence
from .vocabulary import Vocabulary, llguidance

# Seconds of computing that all masks may take in addition to a limit for each.
CREDIT_SECONDS = 0.1
# Matchers that are kept for further texts of the same form.
MAX_MATCHERS = 16


class MaskTime:
    """The time that masks may take. llguidance's limits bound that of each.

    Args:
        seconds_per_mask: Seconds of computing that a mask may take on average; infinity for any.
    """

    def __init__(self, seconds_per_mask: float):
        self.seconds_per_mask = seconds_per_mask
        self._left = CREDIT_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether masks have taken more than they may."""
        return self._left <= 0

    def spend(self, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, which finds a mask."""
        began = time.thread_time()
        found = compute()
        self._left += self.seconds_per_mask - (time.thread_time() - began)
        return found


@lru_cache(MAX_MATCHERS)
def checked_matcher(vocabulary: Vocabulary, grammars: str, kind: str) -> Any:
    """A matcher whose first mask has been computed. It is to be copied.

    Args:
        vocabulary: The tokens.
        grammars: llguidance's, as JSON.
        kind: What the text is, for the error.

    Raises:
        ValueError: If no text follows them.
    """
    limits = llguidance().LLParserLimits(**LIMITS)
    matcher = llguidance().LLMatcher(vocabulary.tokens, grammars, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"The {kind} cannot be followed: {sentence(matcher.get_error())}.")
    return matcher
