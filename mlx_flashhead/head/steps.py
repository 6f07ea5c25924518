"""What the steps of a FlashHead hand to each other.

hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p)
              ─ score ─▶ logits (R, p·n) ─ expand ─▶ (R, V)   or   ─ token, sample ─▶ (R,)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from .draw import Draws

NO_DEPTH = 1e30  # nats: every probe is scored


class Selection(NamedTuple):
    # (R, p) uint32, distinct clusters of each position. From the kernels (R, max(p, 8)), ascending:
    # where fewer are worth scoring the last one is repeated, with logits as in padded slots.
    probes: mx.array
    # (R, C) uint32 for the kernel of `expand`: a cluster's place among the probes, or the estimate
    # of its tokens' logits
    words: mx.array | None = None
    unscored: mx.array | None = None  # (R, 2) float32, from ``PortableSteps.unscored``


class Candidates(NamedTuple):
    logits: mx.array  # (R, p, n) in the dense dtype; padded slots hold the lowest finite value
    best: mx.array | None = None  # (R, p) float32, each probed cluster's best logit, for a kernel


class Proposal(NamedTuple):
    """Tokens chosen from the scored rows of R positions."""

    hidden: mx.array  # (R, D), the states
    tokens: mx.array  # (R,) uint32
    probes: mx.array  # (R, S) uint32, the probed clusters
    logits: mx.array  # (R, S, n), the scored tokens' logits
    risk: mx.array  # (R,) float32, an estimate of the chance of another choice
    full: mx.array | None  # (R, V) logits with estimates, if they were asked for


class Screen(NamedTuple):
    """What the logits of all tokens say of the proposals of k states."""

    certain: mx.array  # (k,) bool, whether a proposal is the dense choice for sure
    largest: mx.array  # (k,) float32, the largest absolute logit
    best_unscored: mx.array  # (k,) float32
    unscored_mass: mx.array  # (k,) float32, a log-sum-exp


class Risk(NamedTuple):
    """How the estimate of that chance depends on what was not scored: for the best token exp(a -
    b·gap) of its distance to the best score of the other clusters, for a draw ``scale`` times their
    mass."""

    a: float = 0.0
    b: float = 1.0
    scale: float = 1.0

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Risk":
        """From an index's settings of the checked loop; the usual numbers where there are none."""
        fitted = settings.get("risk") or {}
        a, b = fitted.get("greedy", (DEFAULT_RISK.a, DEFAULT_RISK.b))
        return cls(a, b, fitted.get("sampled", DEFAULT_RISK.scale))

    def of(self, candidates: Candidates, unscored: mx.array, draws: Draws | None) -> mx.array:
        """The chance for each of R positions, (R,) float32."""
        # over one axis: mlx 0.31 keeps one of two that has a single element
        logits = candidates.logits.flatten(-2).astype(mx.float32)
        best = mx.max(logits if candidates.best is None else candidates.best, axis=-1)
        greedy = mx.exp(self.a - self.b * (best - unscored[:, 0]))
        if draws is None:
            return mx.minimum(greedy, 1.0)
        scored = mx.logsumexp(logits, axis=-1)
        drawn = self.scale * mx.sigmoid(unscored[:, 1] - scored)
        return mx.minimum(mx.where(draws.settings[:, 0] == 0, greedy, drawn), 1.0)


DEFAULT_RISK = Risk()  # the usual numbers


def in_token_order(slots: mx.array, slot_of: mx.array) -> mx.array:
    """Logits by slot (R, C·n) → by token (R, V)."""
    # `take` along an axis is five to ten times slower on a CPU
    return mx.take_along_axis(slots, slot_of[None], axis=-1)
