"""A grammar guesses where it allows one token alone."""

import mlx.core as mx

from ...wide.step import MAX_WIDTH
from ..text import Text
from .guesser import Guesser, LatestToken, Offer


class ForcedTokens(Guesser):
    """Guesses what the grammar of a text allows alone, if there is one."""

    name = "grammar"

    def offer(self, text: Text, latest: LatestToken) -> Offer | None:
        """The tokens that must come, at least one. They are right."""
        if not text.forces_tokens:
            return None
        # The mask of the latest token's place waits for it in any case.
        forced = text.forced_tokens(latest.read(), MAX_WIDTH - 1)
        if not forced:
            return None
        return Offer(self, [1.0] * len(forced), lambda n: mx.array(forced[:n], mx.uint32))
