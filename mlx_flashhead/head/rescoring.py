"""A second look at a head's logits after a mask, a bias or a penalty has changed them.

The change may bring up tokens of clusters that were not scored. All tokens of such a cluster have
the same estimate, which must not decide between them. So the clusters that matter now are scored
too. The change of each estimate is applied to the token's exact logit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from .portable import tail_cap
from .steps import Steps


@dataclass(frozen=True)
class Call:
    """A head's call that did not score every token.

    Attributes:
        head: The head itself.
        steps: Its steps.
        hidden: (R, D) states.
        probes: (R, p) uint32, the scored clusters.
        logits: (R, V), the head's logits.
        notes: Results that readers of the call keep for each other.
    """

    head: Any
    steps: Steps
    hidden: mx.array
    probes: mx.array
    logits: mx.array
    notes: dict[str, mx.array] = field(default_factory=dict)

    def take(self, rows: mx.array) -> "Call":
        """The same call for the states ``rows`` (R',) alone."""
        parts = {name: getattr(self, name)[rows] for name in ("hidden", "probes", "logits")}
        return replace(self, notes={}, **parts)


class LatestCall:
    """Holds the latest call of the heads that it watches.

    Attributes:
        call: The call, whose arrays are lazy; None before the first one, and after one that scored
            every token or drew its clusters.
    """

    call: Call | None = None


def rescored(
    call: Call,
    before: mx.array,
    after: mx.array,
    n_clusters: int,
    finish: Callable[[mx.array], mx.array],
) -> mx.array:
    """Changed logits that are exact where it matters.

    Of the clusters that were not scored, the ``n_clusters`` with the highest log-sum-exp after the
    change are scored now. Their tokens get exact + (after - before), so that a mask or a bias has
    the same effect as with the dense head. The other estimates stay below the best token, as in
    ``PortableSteps.expand``.

    Args:
        call: The call that gave the logits, for these states.
        before: (R, V) the model's logits before the change.
        after: (R, V) its logits after it; -inf rules a token out.
        n_clusters: Number of clusters to score besides those of the call.
        finish: The model's own change of its head's logits (R, V).

    Returns:
        (R, V) in the dtype of ``after``. Lazy.
    """
    steps, clustered = call.steps, call.steps.clustered
    values = after.astype(mx.float32)
    left = mx.logsumexp(steps.in_clusters(values), axis=-1)  # (R, C)
    left = mx.put_along_axis(left, call.probes, mx.array(-mx.inf), axis=-1)
    chosen = steps.select(left, min(n_clusters, clustered.n_clusters - call.probes.shape[-1]))
    ids = steps.token_ids(chosen.probes).flatten(1)
    found = steps.score(call.hidden, chosen).logits.flatten(1)
    every_id = mx.concatenate([steps.token_ids(call.probes).flatten(1), ids], axis=-1)

    # the last column takes the padded slots
    shape = (len(values), clustered.vocab_size + 1)
    is_exact = mx.put_along_axis(mx.zeros(shape, mx.bool_), every_id, mx.array(True), axis=-1)
    logits = mx.put_along_axis(mx.pad(call.logits, [(0, 0), (0, 1)]), ids, found, axis=-1)
    is_exact, logits = is_exact[:, :-1], logits[:, :-1]

    before = before.astype(mx.float32)
    found = finish(logits).astype(mx.float32) + (values - before)
    # tokens that the model itself has ruled out stay so
    values = mx.where(mx.logical_and(is_exact, mx.isfinite(before)), found, values)
    best = mx.max(mx.where(is_exact, values, -mx.inf), axis=-1, keepdims=True)
    return mx.where(is_exact, values, mx.minimum(values, tail_cap(best))).astype(after.dtype)
