"""What the steps of a FlashHead hand to each other. R positions, p probed clusters of n slots."""

from typing import NamedTuple

import mlx.core as mx


class Unscored(NamedTuple):
    """What the clusters that are not probed hold, by their scores."""

    best: mx.array  # (R, 1) float32, the best score
    mass: mx.array | None  # (R, 1) float32, the log of the summed exponentials of mapped logits


class Selection(NamedTuple):
    """The clusters whose rows are scored."""

    # (R, p) uint32, distinct clusters of each position. From the kernels (R, max(p, 8)), ascending:
    # where fewer are worth scoring the last one is repeated, with logits as in padded slots.
    probes: mx.array
    # (R, C) uint32 for the kernel of `expand`: a cluster's place among the probes, or its estimate
    words: mx.array | None = None
    unscored: Unscored | None = None
    # (R, 8) float32, the same from a kernel for another one: the best, the mass, and zeros
    unscored_input: mx.array | None = None


class Candidates(NamedTuple):
    """The scored tokens' logits."""

    logits: mx.array  # (R, p, n) in the dense dtype; padded slots hold the lowest finite value
    best: mx.array | None = None  # (R, p) float32, each probed cluster's best logit, for a kernel


class Proposal(NamedTuple):
    """Tokens chosen from the scored rows of R positions."""

    hidden: mx.array  # (R, D), the states
    tokens: mx.array  # (R,) uint32
    probes: mx.array  # (R, S) uint32, the probed clusters
    logits: mx.array  # (R, S, n), the scored tokens' logits as the model gives them
    risk: mx.array  # (R,) float32, an estimate of the chance of another choice

    def filled(self, n_probes: int) -> "Proposal":
        """The proposal with the last probe repeated, with logits as in padded slots."""
        n_rows, n_probed, size = self.logits.shape
        missing = n_probes - n_probed
        if missing <= 0:
            return self
        last = mx.broadcast_to(self.probes[:, -1:], (n_rows, missing))
        dtype = self.logits.dtype
        nothing = mx.full((n_rows, missing, size), mx.finfo(dtype).min, dtype)
        return self._replace(
            probes=mx.concatenate([self.probes, last], axis=1),
            logits=mx.concatenate([self.logits, nothing], axis=1),
        )


class Screen(NamedTuple):
    """What the logits of all tokens say of the proposals of k states."""

    certain: mx.array  # (k,) bool, whether a proposal is the dense choice for sure
    largest: mx.array  # (k,) float32, the head's largest absolute logit
    best_unscored: mx.array  # (k,) float32, the head's best logit of the tokens not scored
    unscored_mass: mx.array  # (k,) float32, a log-sum-exp of the model's logits of these


class Tolerance(NamedTuple):
    """How far a logit x of the head may lie from the product of its state alone, before any map."""

    product: mx.array  # (k,) float32, for a logit of the product of k states
    scored: mx.array  # (k,) float32, for a scored logit; 0 where it is the same number
    # in addition a share of |x|, for the rounding to 16 bits; not where ``scored`` is 0
    relative: float = 0.0


ProposalRow = tuple[int, int]  # the index of a proposal, and a row of it
