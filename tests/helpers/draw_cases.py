"""Draws of one state from logits that are known within bounds, and what the logits may be."""

import mlx.core as mx
import numpy as np

from kernel_cases import to_numpy
from mlx_flashhead.decoding.random_state import split, uniform_bits
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.proposal import Proposal, Tolerance

N_PROBES = 12


def case_of(rng, clustered, dtype, settings, spread, doubt, n_probes=N_PROBES):
    """Bounds of all slots of one state, a random state, and a proposal from the best clusters."""
    shape = (1, clustered.n_clusters, clustered.cluster_size)
    slots = mx.array(rng.normal(scale=spread, size=shape).astype(np.float32)).astype(dtype)
    probes = mx.argsort(-slots.max(axis=-1), axis=-1)[:, :n_probes].astype(mx.uint32)
    logits = mx.take_along_axis(slots, probes[..., None], axis=1)
    ids = clustered.token_ids[probes]
    logits = mx.where(ids == clustered.vocab_size, mx.finfo(dtype).min, logits)
    state = int(rng.integers(2**31)), int(rng.integers(2**31))
    key = split(state)[1]
    scored = logits.astype(mx.float32).flatten(1)
    ids = ids.flatten(1)
    draws = Draws.of([(settings, (uniform_bits([key])[0], 0))])
    token = type(settings).choose(scored, draws, ids)
    proposal = Proposal(mx.zeros((1, 4)), token, probes, logits, mx.zeros(1))
    tolerance = Tolerance(mx.full((1,), doubt), mx.full((1,), doubt / 2))
    return slots, proposal, draws, tolerance, state


def truths(rng, clustered, slots, proposal, tolerance):
    """Logits by token (V,) within the tolerance, of its dtype: at random, and at its ends."""
    scored = np.zeros(slots.shape[1], bool)
    scored[to_numpy(proposal.probes)[0]] = True
    off = np.where(scored[:, None], tolerance.scored.item(), tolerance.product.item())
    for i in range(6):
        shape = slots.shape[1:]
        if i % 2:
            shift = rng.uniform(-1, 1, shape)
        else:
            shift = rng.choice([-1.0, 1.0], shape)
        moved = to_numpy(slots[0].astype(mx.float32)) + off * shift
        by_token = moved.reshape(-1)[to_numpy(clustered.slot_of)]
        yield mx.array(by_token.astype(np.float32)).astype(slots.dtype)
