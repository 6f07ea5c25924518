"""The four steps of a FlashHead: the base of both paths.

hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p)
              ─ score ─▶ logits (R, p·n) ─ expand ─▶ (R, V)   or   ─ token, sample ─▶ (R,)
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import mlx.core as mx

from .clustered import ClusteredRows
from .draw import Draws

NO_DEPTH = 1e30  # nats: every probe is scored


class Selection(NamedTuple):
    """The clusters to score.

    Attributes:
        probes: (R, p) uint32, distinct clusters of each position. From the kernels (R, max(p, 8)),
            ascending: where fewer are worth scoring the last one is repeated, with logits of the
            lowest finite value, as padded slots have them.
        words: (R, C) uint32 for the kernel of `expand`, a cluster's place among the probes or the
            estimate of its tokens' logits; None if `expand` makes it from the scores.
        unscored: (R, 2) float32, what :meth:`Steps.unscored` gives; None if it has to be computed.
    """

    probes: mx.array
    words: mx.array | None = None
    unscored: mx.array | None = None


class Candidates(NamedTuple):
    """The scored rows.

    Attributes:
        logits: (R, p, n) in the dense head's dtype; a padded slot holds the lowest finite value.
        best: (R, p) float32, each probed cluster's best logit; None if no kernel reads it.
    """

    logits: mx.array
    best: mx.array | None = None


def in_token_order(slots: mx.array, slot_of: mx.array) -> mx.array:
    """Logits by slot (R, C·n) → by token (R, V)."""
    # `take` along an axis is five to ten times slower on a CPU
    return mx.take_along_axis(slots, slot_of[None], axis=-1)


class Steps(ABC):
    """The base of both paths.

    Args:
        clustered: The rows and the index.
    """

    name: str  # of the path

    def __init__(self, clustered: ClusteredRows):
        self.clustered = clustered

    @abstractmethod
    def route(self, hidden: mx.array) -> mx.array:
        """Scores of all clusters: hidden (R, D) → (R, C) float32."""

    @abstractmethod
    def select(
        self, scores: mx.array, n_probes: int, words: bool = True, depth: float = NO_DEPTH
    ) -> Selection:
        """The ``n_probes`` best clusters of each row: (R, C) → (R, p).

        Args:
            scores: (R, C) float32.
            n_probes: Clusters to probe, 1 … C.
            words: Also give what the kernel of `expand` needs.
            depth: Clusters more than this many nats below the log-sum-exp of all scores need not be
                probed: together they hold at most C·exp(-depth) of the mass. The kernels then score
                fewer rows; for `token` and `sample` only.
        """

    @abstractmethod
    def score(self, hidden: mx.array, selection: Selection) -> Candidates:
        """Logits of the probed clusters' rows: hidden (R, D) → (R, p, n)."""

    @abstractmethod
    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Full logits, (R, V) in the candidates' dtype."""

    @abstractmethod
    def token(self, selection: Selection, candidates: Candidates) -> mx.array:
        """The greedy token: (R,) uint32."""

    @abstractmethod
    def unscored(self, scores: mx.array, selection: Selection) -> mx.array:
        """Of the clusters that are not probed, (R, 2) float32: the best score, and the logsumexp.

        A cluster's score is the log of its expected mass, so the second is that of the tail.
        """

    @abstractmethod
    def sample(
        self, selection: Selection, candidates: Candidates, unscored: mx.array, draws: Draws
    ) -> mx.array:
        """The drawn token: (R,) uint32; see `draw.py`."""

    def arrays(self) -> list[mx.array]:
        """Arrays held besides those of ``clustered``."""
        return []

    def product(self, hidden: mx.array) -> mx.array:
        """Logits of all slots, in their order: hidden (R, D) → (R, C·n)."""
        return self.clustered.flat_rows().matmul(hidden)

    def dense(self, hidden: mx.array) -> mx.array:
        """Logits of all tokens: hidden (R, D) → (R, V)."""
        return in_token_order(self.product(hidden), self.clustered.slot_of)

    def token_ids(self, probes: mx.array) -> mx.array:
        """Token ids of the probed clusters: (R, p) → (R, p, n) uint32, V for a padded slot."""
        return mx.take(self.clustered.token_ids, probes, axis=0)
