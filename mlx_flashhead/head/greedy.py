"""Greedy tokens in place of full logits, for loops that use nothing else of them."""

import mlx.core as mx


class GreedyTokens:
    """Holds the greedy tokens of a head's latest call.

    Attributes:
        latest: (..., L) uint32, lazy; None before the first call.
    """

    latest: mx.array | None = None

    def __init__(self):
        self._logit = mx.zeros((1,))

    def take(self, tokens: mx.array) -> mx.array:
        """Holds ``tokens`` (..., L), and returns logits (..., L, 1) that say nothing."""
        self.latest = tokens
        return mx.broadcast_to(self._logit, (*tokens.shape, 1))

    def sampler(self, logprobs: mx.array) -> mx.array:
        """A sampler for mlx-lm's loops: (B, 1) → the tokens at the last position, (B,).

        Raises:
            RuntimeError: If the head has not been called.
        """
        if self.latest is None:
            raise RuntimeError("The head has found no token yet.")
        return self.latest[..., -1]
