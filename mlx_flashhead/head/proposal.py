"""A proposed token, and how likely the dense head chooses another one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from .draw import Draws
from .steps import Candidates


class Proposal(NamedTuple):
    """Tokens chosen from the scored rows of R positions.

    Attributes:
        hidden: (R, D), the states.
        tokens: (R,) uint32.
        probes: (R, S) uint32, the probed clusters.
        logits: (R, S, n), the scored tokens' logits.
        risk: (R,) float32, an estimate of the chance of another choice.
        full: (R, V) logits with estimates, if they were asked for.
    """

    hidden: mx.array
    tokens: mx.array
    probes: mx.array
    logits: mx.array
    risk: mx.array
    full: mx.array | None


class Risk(NamedTuple):
    """How the estimate of that chance depends on what was not scored.

    For the best token it is exp(a - b·gap), where the gap is that of the best scored logit to the
    best score of the other clusters. For a draw it is the other clusters' share of the mass times
    ``scale``. Both are at most 1. A conversion fits the numbers; they decide about speed alone.
    """

    a: float = 0.0
    b: float = 1.0
    scale: float = 1.0

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Risk":
        """From an index's settings of the checked loop; the usual numbers where there are none."""
        fitted = settings.get("risk") or {}
        a, b = fitted.get("greedy", (cls().a, cls().b))
        return cls(a, b, fitted.get("sampled", cls().scale))

    def of(self, candidates: Candidates, unscored: mx.array, draws: Draws | None) -> mx.array:
        """The chance for each of R positions, (R,) float32."""
        if candidates.best is not None:
            best = mx.max(candidates.best, axis=-1)
        else:
            best = mx.max(candidates.logits, axis=(-2, -1)).astype(mx.float32)
        greedy = mx.exp(self.a - self.b * (best - unscored[:, 0]))
        if draws is None:
            return mx.minimum(greedy, 1.0)
        logits = candidates.logits.astype(mx.float32)
        # over one axis: mlx 0.31 keeps one of two that has a single element
        scored = mx.logsumexp(logits.flatten(-2), axis=-1)
        drawn = self.scale * mx.sigmoid(unscored[:, 1] - scored)
        return mx.minimum(mx.where(draws.settings[:, 0] == 0, greedy, drawn), 1.0)


USUAL_RISK = Risk()  # the usual numbers
