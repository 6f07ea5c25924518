"""Which proposals are certain to be the dense choice, whatever lies within the rounding of logits
of k states at once, or of those scored in one position."""

from typing import NamedTuple

import mlx.core as mx

from .draw import Draws, log_mass, noise, noise_of_all, threshold
from .steps import Proposal

# Clusters that were not scored, whose tokens a filter may keep all the same.
MORE_CLUSTERS = 32

Bounds = tuple[mx.array, mx.array]  # the lowest and the highest value


def is_certain_best(
    head, rounding, slots: mx.array, proposal: Proposal
) -> mx.array:
    """For a proposal of the best token of k states: (k,) bool, lazy, by the logits ``slots`` (k, C,
    n) of all states at once, in the order of the clusters."""
    largest = mx.ones((len(slots),))
    others = _without(slots, proposal.probes, head).max(axis=(1, 2))
    is_token = mx.take(head.clustered.token_ids, proposal.probes, axis=0)
    is_token = is_token == proposal.tokens[:, None, None]
    logits = proposal.logits.astype(mx.float32)
    own = mx.max(logits, axis=(1, 2))
    second = mx.max(mx.where(is_token, -mx.inf, logits), axis=(1, 2))
    # mlx-lm's loop takes the best log-probability, which is rounded once more
    below = mx.logsumexp(logits.flatten(1), axis=-1) - own + (own - second) + 0.5
    merged = below * rounding.epsilon
    above_scored = own - second > 2 * rounding.scored * largest + merged
    above_others = own - others > (rounding.batch + rounding.scored) * largest + merged
    return above_scored & above_others


def is_certain_draw(
    head, rounding, slots: mx.array, proposal: Proposal, draws: Draws
) -> mx.array:
    """For a proposal of drawn tokens, as :func:`is_certain_best`. Either every row's draw leaves
    tokens out, or none's."""
    largest = mx.ones((len(slots), 1))
    room, room_scored = rounding.batch[:, None] * largest, rounding.scored[:, None] * largest
    probes, others = proposal.probes, _without(slots, proposal.probes, head)
    tail = mx.logsumexp(others.flatten(1), axis=-1)[:, None]
    near, left = _nearest(others)
    ids = mx.take(head.clustered.token_ids, mx.concatenate([probes, near], axis=-1), axis=0)
    ids = ids.flatten(1)
    logits = proposal.logits.astype(mx.float32).flatten(1)
    more = mx.take_along_axis(others, near[..., None], axis=1).flatten(1)
    bounds = (
        mx.concatenate([logits - room_scored, more - room], axis=-1),
        mx.concatenate([logits + room_scored, more + room], axis=-1),
    )
    least = mx.logaddexp(log_mass(logits - room_scored), tail - room)
    most = mx.logaddexp(log_mass(logits + room_scored), tail + room)
    own = ids == proposal.tokens[:, None]
    gumbel = noise(draws.keys, ids)
    worst, rival, lowest = _outcomes(bounds, (least, most), own, gumbel, draws)
    if draws.of_rows[0].filters:
        return (worst > rival) & (left + room[:, 0] < lowest)
    gumbel = noise_of_all(draws.keys, head.vocab_size)
    real = mx.minimum(head.clustered.token_ids.reshape(-1), head.vocab_size - 1)
    gumbel = mx.take(gumbel, real, axis=-1).reshape(slots.shape)
    noisy = (others + room[..., None]) * draws.settings[:, :1, None] + gumbel
    return worst > mx.maximum(rival, mx.max(noisy, axis=(1, 2)))


def is_certain_within(
    logits: mx.array, room: mx.array, epsilon: float, token: int, draws: Draws | None
) -> mx.array:
    """For a choice from the logits of all tokens (1, V), each of which may lie ``room`` away: (1,)
    bool, lazy. ``epsilon`` is the spacing of their dtype, relative to a logit."""
    values = logits.astype(mx.float32)
    own = (mx.arange(values.shape[-1]) == token)[None]
    if draws is None:
        best = mx.max(mx.where(own, values, -mx.inf), axis=-1)
        second = mx.max(mx.where(own, -mx.inf, values), axis=-1)
        merged = (log_mass(values)[:, 0] - second + 0.5) * epsilon
        return best - second > 2 * room + merged
    bounds = values - room, values + room
    mass = log_mass(bounds[0]), log_mass(bounds[1])
    gumbel = noise_of_all(draws.keys, values.shape[-1])
    worst, rival, _ = _outcomes(bounds, mass, own, gumbel, draws)
    return worst > rival


def _outcomes(
    bounds: Bounds, mass: Bounds, own: mx.array, gumbel: mx.array, draws: Draws
) -> tuple[mx.array, mx.array, mx.array]:
    """By the bounds of logits (k, K) and of the log of the mass (k, 1): the proposal's lowest noisy
    logit, -inf where it may be left out; the highest of any other; the lowest that may be kept."""
    (low, high), (least, most) = bounds, mass
    surely, maybe = threshold(high, draws, least), threshold(low, draws, most)
    inverse = draws.settings[:, :1]
    worst = mx.where(own & (low >= surely), low * inverse + gumbel, -mx.inf)
    rival = mx.where(~own & (high >= maybe), high * inverse + gumbel, -mx.inf)
    return mx.max(worst, axis=-1), mx.max(rival, axis=-1), maybe[:, 0]


def _nearest(others: mx.array) -> tuple[mx.array, mx.array]:
    """The clusters with the best logits, (k, m) uint32, and the best logit of all others, (k,)."""
    best = mx.max(others, axis=-1)
    n_clusters = best.shape[-1]
    if n_clusters <= MORE_CLUSTERS:
        every = mx.broadcast_to(mx.arange(n_clusters, dtype=mx.uint32), best.shape)
        return every, mx.full((len(best),), -mx.inf)
    order = mx.argpartition(-best, kth=MORE_CLUSTERS, axis=-1)
    left = mx.take_along_axis(best, order[:, MORE_CLUSTERS : MORE_CLUSTERS + 1], axis=-1)
    return order[:, :MORE_CLUSTERS], left[:, 0]


def _largest(slots: mx.array) -> mx.array:
    """The largest absolute logit of each state: (k, C, n) → (k,) float32."""
    high, low = mx.max(slots, axis=(1, 2)), mx.min(slots, axis=(1, 2))
    return mx.maximum(high, -low).astype(mx.float32)


def _without(slots: mx.array, probes: mx.array, head) -> mx.array:
    """The logits (k, C, n) float32, with -inf where they were scored or the slot is padded."""
    values = slots.astype(mx.float32)
    values = mx.put_along_axis(values, probes[..., None], mx.array(-mx.inf), axis=1)
    if head.clustered.padded:
        values = mx.where(head.clustered.token_ids == head.vocab_size, -mx.inf, values)
    return values


class Screen(NamedTuple):
    certain: mx.array


class R(NamedTuple):
    epsilon: float
    batch: mx.array
    scored: mx.array


def joined(proposals, rows, tokens):
    names = ("hidden", "probes", "logits")
    arrays = [
        mx.concatenate([getattr(proposals[p], n)[r : r + 1] for p, r in rows]) for n in names
    ]
    return Proposal(arrays[0], mx.array(tokens, mx.uint32), arrays[1], arrays[2], None, None)


def certain(head, slots, proposal, draws, room, scored, epsilon):
    if draws is None:
        return Screen(is_certain_best(head, R(epsilon, room, scored), slots, proposal))
    rows = draws.of_rows
    flags = [None] * len(rows)
    for i, s in enumerate(rows):
        one = Proposal(*(a[i : i + 1] if a is not None else None for a in proposal))
        r = R(epsilon, room[i : i + 1], scored[i : i + 1])
        if s.greedy:
            flags[i] = is_certain_best(head, r, slots[i : i + 1], one)
        else:
            d = draws._replace(settings=draws.settings[i : i + 1], top_k=draws.top_k[i : i + 1], keys=draws.keys[i : i + 1], of_rows=[s])
            flags[i] = is_certain_draw(head, r, slots[i : i + 1], one, d)
    return Screen(mx.concatenate(flags))
