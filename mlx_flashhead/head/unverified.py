"""The unverified head: exact logits of the scored tokens, and estimates of all others.

Source: arXiv 2603.14591; for draws of clusters Efraimidis and Spirakis 2006, or Gumbel top-k:
    perturbed scores, of which the p largest are taken.
"""

import mlx.core as mx

from .operations import PortableOperations
from .proposal import Candidates, Selection

# Score of clusters whose tokens must not be drawn: exp() of it is 0; -inf breaks softcaps and JSON.
NEVER_DRAWN = -1e4


def unverified_logits(
    operations: PortableOperations, hidden: mx.array, n_probes: int, draw_temperature: float | None
) -> mx.array:
    """Full logits by few clusters: states (R, D) → (R, V).

    Args:
        operations: Of the head.
        hidden: (R, D).
        n_probes: The number of clusters that are scored.
        draw_temperature: Draws the clusters without replacement from softmax(S / temperature), and
            leaves all other tokens out; None takes the best ones.
    """
    scores, selection, candidates = retrieve(operations, hidden, n_probes, draw_temperature)
    if draw_temperature is not None:
        scores = mx.full(scores.shape, NEVER_DRAWN, dtype=mx.float32)
        # without the estimates, which belong to other scores
        selection = Selection(selection.probes[:, :n_probes])
        candidates = Candidates(candidates.logits[:, :n_probes])
    return operations.expand(scores, selection, candidates)


def retrieve(
    operations: PortableOperations,
    hidden: mx.array,
    n_probes: int,
    draw_temperature: float | None,
    *,
    words: bool = True,
) -> tuple[mx.array, Selection, Candidates]:
    """Scores the clusters, and the tokens of some: the scores (R, C), these clusters, their logits.

    The arguments are those of `unverified_logits`; ``words`` are for `expand`.
    """
    scores = operations.route(hidden)
    ordering = scores
    if draw_temperature is not None:
        # always probed clusters keep their 1e30 and stay on top
        ordering = scores / draw_temperature + mx.random.gumbel(scores.shape)
    selection = operations.select(ordering, n_probes, words=words)
    return scores, selection, operations.score(hidden, selection)
