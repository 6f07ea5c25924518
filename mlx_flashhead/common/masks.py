"""Processors that rule tokens out and change no other logit, such as grammars."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


class Mask:
    """A logits processor that gives minus infinity to each token that may not come next.

    A text with one is verified, without the logits of all tokens.

    Args:
        allowed: (n,) tokens of a text and V → (⌈V/32⌉,) uint32, a bit for each token that may come
            next, that of token t bit t % 32 of word t // 32; None where all may.
        forced: (n,) tokens and a number → the next tokens, so many at most, if no others may come.

    Attributes:
        forces: Whether :meth:`forced_tokens` may return some.
    """

    forces = False

    def __init__(
        self,
        allowed: Callable[[Any, int], Any],
        forced: Callable[[Any, int], list[int]] | None = None,
    ):
        self._allowed = allowed
        self._forced = forced
        self.forces = forced is not None

    def allowed(self, tokens: Any, vocab_size: int) -> np.ndarray | None:
        """Which tokens may come after ``tokens`` (n,), as the function given says."""
        words = self._allowed(tokens, vocab_size)
        if words is None:
            return None
        return np.array(words, np.uint32).reshape(-1)

    def forced_tokens(self, tokens: Any, most: int) -> list[int]:
        """The next tokens after ``tokens`` (n,) if no others may come, ``most`` of them at most."""
        if self._forced is None:
            return []
        return self._forced(tokens, most)

    def n_allowed(self, tokens: Any, guessed: list[int], vocab_size: int) -> int:
        """How many of ``guessed`` may follow ``tokens`` (n,), up to one that may not.

        Args:
            tokens: Those so far, as for :meth:`allowed`.
            guessed: Token ids that someone expects next.
            vocab_size: V.
        """
        for n_before, token in enumerate(guessed):
            context = mx.concatenate([tokens, mx.array(guessed[:n_before], tokens.dtype)])
            words = self.allowed(context, vocab_size)
            if words is not None and not words[token // 32] >> (token % 32) & 1:
                return n_before
        return len(guessed)

    def begin(self) -> None:
        """Is called when a text begins."""

    def for_text(self) -> "Mask":
        """A mask of the same class for a text of its own: this one, which keeps no state."""
        return self

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        """Logits (1, V) with -inf for each token that may not follow ``tokens`` (n,)."""
        mx.async_eval(logits)
        words = self.allowed(tokens, logits.shape[-1])
        if words is None:
            return logits
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.shape[-1]]
        return mx.where(mx.array(bits.astype(bool)), logits, -mx.inf)
