"""What the operations of a FlashHead hand to each other.

There are R positions, and p probed clusters of n slots.
"""

from typing import NamedTuple

import mlx.core as mx


class Unscored(NamedTuple):
    """What the clusters that are not probed hold, by their scores.

    Attributes:
        best: (R, 1) float32, the best score.
        mass: (R, 1) float32, the log of the summed exponentials of mapped logits; None where it is
            not wanted.
    """

    best: mx.array
    mass: mx.array | None


class Selection(NamedTuple):
    """The clusters whose rows are scored.

    Attributes:
        probes: (R, p) uint32, distinct clusters of each position. From the kernels (R, max(p, 8)),
            ascending: where fewer are worth scoring the last one is repeated, with logits as in
            padded slots.
        words: (R, C) uint32 for the kernel of `expand`: a cluster's number among the probes, or its
            estimate.
        unscored: What the other clusters hold.
        unscored_input: (R, 8) float32, the same from a kernel for another one: the best, the mass,
            and zeros.
    """

    probes: mx.array
    words: mx.array | None = None
    unscored: Unscored | None = None
    unscored_input: mx.array | None = None


class Candidates(NamedTuple):
    """The scored tokens' logits.

    Attributes:
        logits: (R, p, n) in the dense dtype. Padded slots hold the lowest finite value.
        best: (R, p) float32, each probed cluster's best logit, for a kernel.
    """

    logits: mx.array
    best: mx.array | None = None


class Proposal(NamedTuple):
    """Tokens chosen from the scored rows of R positions.

    Attributes:
        hidden: (R, D), the states.
        tokens: (R,) uint32.
        probes: (R, S) uint32, the probed clusters.
        logits: (R, S, n), the scored tokens' logits as the model gives them.
        risk: (R,) float32, an estimate of the chance of another choice.
    """

    hidden: mx.array
    tokens: mx.array
    probes: mx.array
    logits: mx.array
    risk: mx.array

    def filled(self, n_probes: int) -> "Proposal":
        """The proposal with the last probe repeated, with logits as in padded slots."""
        n_positions, n_probed, size = self.logits.shape
        missing = n_probes - n_probed
        if missing <= 0:
            return self
        last = mx.broadcast_to(self.probes[:, -1:], (n_positions, missing))
        probes = mx.concatenate([self.probes, last], axis=1)
        dtype = self.logits.dtype
        nothing = mx.full((n_positions, missing, size), mx.finfo(dtype).min, dtype)
        logits = mx.concatenate([self.logits, nothing], axis=1)
        return self._replace(probes=probes, logits=logits)


class Screen(NamedTuple):
    """What the logits of all tokens say of the proposals of k states.

    Attributes:
        certain: (k,) bool, whether a proposal is the dense choice for sure.
        largest: (k,) float32, the head's largest absolute logit.
        best_unscored: (k,) float32, the head's best logit of the tokens not scored.
        unscored_mass: (k,) float32, a log-sum-exp of the model's logits of these.
    """

    certain: mx.array
    largest: mx.array
    best_unscored: mx.array
    unscored_mass: mx.array


class Tolerance(NamedTuple):
    """How far a logit x of the head may lie from the product of its state alone, before any map.

    Attributes:
        product: (k,) float32, for a logit of the product of k states.
        scored: (k,) float32, for a scored logit; 0 where it is the same number.
        relative: In addition a share of |x|, for the rounding to 16 bits; not where ``scored`` is
            0.
    """

    product: mx.array
    scored: mx.array
    relative: float = 0.0


# The index of a proposal, and one of its positions.
ProposalPosition = tuple[int, int]
