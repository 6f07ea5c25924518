"""What an unverified FlashHead scores and chooses."""

import mlx.core as mx

from mlx_flashhead.head.draws.greedy import best_draws
from mlx_flashhead.head.unverified import retrieve


def candidates(head, hidden: mx.array) -> tuple[mx.array, mx.array]:
    """The ids of the scored tokens for states (..., D), V in padded slots, and their logits."""
    selection, scored = _retrieved(head, hidden)
    n_probes = head.unverified_probes
    shape = (*hidden.shape[:-1], n_probes * head.cluster_size)
    ids = head.operations.token_ids(selection.probes)[:, :n_probes]
    return ids.reshape(shape), scored.logits[:, :n_probes].reshape(shape)


def best_token(head, hidden: mx.array) -> mx.array:
    """The token with the best scored logit for states (..., D): (...) uint32."""
    selection, scored = _retrieved(head, hidden)
    tokens, _ = head.operations.choose(selection, scored, best_draws(len(scored.logits)))
    return tokens.reshape(hidden.shape[:-1])


def _retrieved(head, hidden: mx.array):
    states = hidden.reshape(-1, hidden.shape[-1])
    _, selection, scored = retrieve(
        head.operations,
        states,
        head.unverified_probes,
        head._settings.draw_temperature,
        words=False,
    )
    return selection, scored
