"""What the steps of a FlashHead hand to each other.

hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p)
              ─ score ─▶ logits (R, p·n) ─ expand ─▶ (R, V)   or   ─ token, sample ─▶ (R,)
"""

from typing import NamedTuple

import mlx.core as mx

NO_DEPTH = 1e30  # nats: every probe is scored


class Selection(NamedTuple):
    """The clusters to score."""

    # (R, p) uint32, distinct clusters of each position. From the kernels (R, max(p, 8)), ascending:
    # where fewer are worth scoring the last one is repeated, with logits as in padded slots.
    probes: mx.array
    # (R, C) uint32 for the kernel of `expand`: a cluster's place among the probes, or the estimate
    # of its tokens' logits
    words: mx.array | None = None
    unscored: mx.array | None = None  # (R, 2) float32, from ``PortableSteps.unscored``


class Candidates(NamedTuple):
    """The scored rows."""

    logits: mx.array  # (R, p, n) in the dense dtype; padded slots hold the lowest finite value
    best: mx.array | None = None  # (R, p) float32, each probed cluster's best logit, for a kernel


def in_token_order(slots: mx.array, slot_of: mx.array) -> mx.array:
    """Logits by slot (R, C·n) → by token (R, V)."""
    # `take` along an axis is five to ten times slower on a CPU
    return mx.take_along_axis(slots, slot_of[None], axis=-1)
