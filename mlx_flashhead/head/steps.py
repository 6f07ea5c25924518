"""The steps of a FlashHead in plain MLX operations, and what they hand to each other: the CPU path,
the fallback, and the reference of the Metal kernels. Nothing here evaluates.

hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p)
              ─ score ─▶ logits (R, p·n) ─ expand ─▶ (R, V)   or   ─ choose ─▶ (R,)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .clustered import ClusteredRows
from .dense_kernels import dense_ranges
from .draw import Draws, draw, log_mass, noise, noise_of_all
from .matrix import Matrix

NO_DEPTH = 1e30  # nats: every probe is scored
# The tail stays this far below the best candidate, so that greedy decoding returns a scored token.
# A cap at the maximum itself ties, and in bfloat16 so does a margin of 0.1.
MARGIN_SHARE = 1 / 64

# Multiply-adds of one state's product with a block: above about a million OpenBLAS copies the
# matrix first, which does not pay for few states (docs/how-it-works.md).
BLOCK_PRODUCTS = 500_000
BLOCK_MULTIPLE = 16  # rows of a block: whole vectors
# Rows that are dequantized at once: for all of them MLX's CPU build needs three times the floats.
PIECE = 64
FLOAT16_FROM = 6  # states: fewer are not multiplied as a matrix on any GPU that lacks bfloat16

# Room for two implementations of a logarithm, and for sums of many exponentials.
NOISE_ROOM, MASS_ROOM, LIKELY_NOISE = 1e-5, 1e-4, 11.0  # one in e^11 tokens has more noise
NEAREST = 1024  # clusters that were not scored, of whose tokens the noise is computed for filters


class Selection(NamedTuple):
    # (R, p) uint32, distinct clusters of each position. From the kernels (R, max(p, 8)), ascending:
    # where fewer are worth scoring the last one is repeated, with logits as in padded slots.
    probes: mx.array
    # (R, C) uint32 for the kernel of `expand`: a cluster's place among the probes, or its estimate
    words: mx.array | None = None
    unscored: mx.array | None = None  # (R, 2) float32, as :func:`unscored` gives it


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
    full: mx.array | None  # (R, V) logits with estimates, if requested


class Screen(NamedTuple):
    """What the logits of all tokens say of the proposals of k states."""

    certain: mx.array  # (k,) bool, whether a proposal is the dense choice for sure
    largest: mx.array  # (k,) float32, the largest absolute logit
    best_unscored: mx.array  # (k,) float32
    unscored_mass: mx.array  # (k,) float32, a log-sum-exp


class Risk(NamedTuple):
    """That estimate, by what was not scored: for the best token exp(a - b·gap) of its distance to
    the best score of the other clusters, for a draw ``scale`` times their mass."""

    a: float = 0.0
    b: float = 1.0
    scale: float = 1.0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Risk":
        """From an index's settings of verification; the usual numbers where there are none."""
        fitted = settings.get("risk") or {}
        a, b = fitted.get("greedy", USUAL[:2])
        return cls(a, b, fitted.get("sampled", USUAL.scale))

    def of(self, candidates: Candidates, unscored: mx.array, draws: Draws | None) -> mx.array:
        """For each of R positions, (R,) float32."""
        logits = candidates.logits.flatten(-2).astype(mx.float32)
        best = mx.max(logits if candidates.best is None else candidates.best, axis=-1)
        greedy = mx.exp(self.a - self.b * (best - unscored[:, 0]))
        if draws is None:
            return mx.minimum(greedy, 1.0)
        scored = mx.logsumexp(logits, axis=-1)
        drawn = self.scale * mx.sigmoid(unscored[:, 1] - scored)
        return mx.minimum(mx.where(draws.settings[:, 0] == 0, greedy, drawn), 1.0)


USUAL = Risk()

Rows = Sequence[tuple[int, int]]  # (index of a proposal, row of it) each
# How far any logit of k states, and a scored one, may lie from its state alone: (k,) float32
Rooms = tuple[mx.array, mx.array]


def unscored(scores: mx.array, probes: mx.array) -> mx.array:
    """Best score and logsumexp of the clusters that are not probed, (R, 2) float32."""
    lowest = mx.array(mx.finfo(mx.float32).min)
    left = mx.put_along_axis(scores, probes, lowest, axis=-1)
    return mx.stack([mx.max(left, axis=-1), mx.logsumexp(left, axis=-1)], axis=-1)


def in_token_order(slots: mx.array, slot_of: mx.array) -> mx.array:
    """Logits by slot (R, C·n) → by token (R, V). `take` is five to ten times slower on a CPU."""
    return mx.take_along_axis(slots, slot_of[None], axis=-1)


def in_blocks(matrix: Matrix) -> mx.array:
    """Rows (V, D) for ``blocked_product``: (n_blocks, block, D) float32, zeros at the end, and as
    columns in memory, of which MLX's BLAS takes half the time. Lazy."""
    n_rows, hidden_size = matrix.n_rows, matrix.hidden_size
    n_blocks = -(-n_rows * hidden_size // BLOCK_PRODUCTS)
    block = BLOCK_MULTIPLE * -(-n_rows // (n_blocks * BLOCK_MULTIPLE))
    rows = mx.zeros((n_blocks * block, hidden_size))
    for start in range(0, n_rows, PIECE):
        part = mx.arange(start, min(start + PIECE, n_rows))
        rows[start : start + len(part)] = matrix.take(part).dequantized(mx.float32)
    return mx.contiguous(rows.reshape(n_blocks, block, -1).swapaxes(-1, -2)).swapaxes(-1, -2)


def blocked_product(hidden: mx.array, blocks: mx.array) -> mx.array:
    """(R, D) times all rows (n_blocks, block, D) → (R, n_blocks·block). Fast for few states."""
    return (hidden @ blocks.swapaxes(-1, -2)).swapaxes(0, 1).reshape(len(hidden), -1)


class PortableSteps:
    """Each step as MLX operations."""

    name = "mlx"
    float16_rows: Matrix | None = None  # all rows, for :meth:`verifying_product` on some GPUs
    gathers_rows = False  # whether :meth:`dense` of one state multiplies the rows in token order

    def __init__(self, clustered: ClusteredRows):
        self.clustered = clustered
        self._on_cpu = mx.default_device().type == mx.cpu
        # the CPU build multiplies float32 far faster than 4 bits, so it dequantizes the centroids
        self._centroids = in_blocks(clustered.centroids.matrix) if self._on_cpu else None
        self._ranges: list[tuple[int, int, int]] = []
        if mx.metal.is_available():
            n_slots = clustered.token_ids.size
            self._ranges = dense_ranges(clustered.rows, clustered.vocab_size, n_slots)
            self.gathers_rows = not self._ranges

    def arrays(self) -> list[mx.array]:
        return [] if self._centroids is None else [self._centroids]

    def product(self, hidden: mx.array) -> mx.array:
        """Logits of all slots, in their order: hidden (R, D) → (R, C·n)."""
        if not self.clustered.by_column:
            return self.clustered.flat_rows().matmul(hidden)
        rows = self.clustered.rows
        logits = blocked_product(hidden, rows.weight)
        return logits if rows.bias is None else logits + rows.bias.reshape(-1)

    def verifying_product(self, hidden: mx.array) -> mx.array:
        """As :meth:`product`, for states that are verified: another rounding is allowed. In float16
        where these rows are the same in it and a GPU lacks bfloat16."""
        if self.float16_rows is None or hidden.dtype != mx.bfloat16 or len(hidden) < FLOAT16_FROM:
            return self.product(hidden)
        logits = self.float16_rows.matmul(hidden.astype(mx.float16))
        return logits.astype(self.clustered.rows.logits_dtype(hidden.dtype))

    def dense(self, hidden: mx.array) -> mx.array:
        """Logits of all tokens: hidden (R, D) → (R, V). Of one state they are those of the model's
        own rows on an Apple GPU, to the last bit."""
        if len(hidden) > 1:
            return in_token_order(self.product(hidden), self.clustered.slot_of)
        if self.gathers_rows:
            return self.clustered.token_rows().matmul(hidden)
        return in_token_order(self._product_of_one(hidden), self.clustered.slot_of)

    def _product_of_one(self, hidden: mx.array) -> mx.array:
        """Logits of all slots, (1, D) → (1, C·n), by the kernel that MLX has for V rows."""
        if len(self._ranges) < 2:
            return self.product(hidden)
        parts = []
        rows = self.clustered.flat_rows()
        for start, stop, n_new in self._ranges:
            logits = rows.part(start, stop).matmul(hidden)
            parts.append(logits[:, stop - start - n_new :])
        return mx.concatenate(parts, axis=-1)

    def token_ids(self, probes: mx.array) -> mx.array:
        """Token ids of the probed clusters: (R, p) → (R, p, n) uint32, V for a padded slot."""
        return mx.take(self.clustered.token_ids, probes, axis=0)

    def route(self, hidden: mx.array) -> mx.array:
        """Scores of all clusters: hidden (R, D) → (R, C) float32."""
        route_bias = self.clustered.route_bias
        if self._centroids is None:
            scores = self.clustered.centroids.matrix.matmul(hidden).astype(mx.float32)
        else:
            scores = blocked_product(hidden.astype(mx.float32), self._centroids)
            scores = scores[..., : len(route_bias)]
        return scores + route_bias

    def select(
        self, scores: mx.array, n_probes: int, words: bool = True, depth: float = NO_DEPTH
    ) -> Selection:
        """The ``n_probes`` best clusters of each row, unordered: (R, C) float32 → (R, p). Kernels
        give ``words`` for `expand`, and leave clusters out that lie more than ``depth`` nats below
        the log-sum-exp of all scores: at most C·exp(-depth) of the mass."""
        n_left = scores.shape[-1] - n_probes
        probes = mx.broadcast_to(mx.arange(n_probes, dtype=mx.uint32), (len(scores), n_probes))
        if n_left > 0:
            probes = mx.argpartition(scores, kth=n_left, axis=-1)[..., n_left:]
        return Selection(probes, unscored=unscored(scores, probes))

    def score(self, hidden: mx.array, selection: Selection) -> Candidates:
        """Logits of the probed clusters' rows: hidden (R, D) → (R, p, n)."""
        rows, probes = self.clustered.rows, selection.probes
        stacked = mx.expand_dims(hidden, (1, 2))  # (R, 1, 1, D) against (R, p) blocks of (n, D)
        gathers = not self._on_cpu or hidden.dtype == mx.float32  # for gather_mm of the CPU build
        if rows.scales is not None:
            arrays = (rows.weight, rows.scales, rows.biases)
            options = {"rhs_indices": probes, "transpose": True, **rows.quantization}
            logits = mx.gather_qmm(stacked, *arrays, **options).squeeze(-2)
        elif rows.weight.dtype == hidden.dtype and gathers:
            blocks = rows.weight.swapaxes(-1, -2)
            logits = mx.gather_mm(stacked, blocks, rhs_indices=probes).squeeze(-2)
        else:
            blocks = mx.take(rows.weight, probes, axis=0)  # (R, p, n, D)
            logits = (blocks @ hidden[:, None, :, None]).squeeze(-1)
        if rows.bias is not None:
            logits = logits + mx.take(rows.bias, probes, axis=0)
        if self.clustered.padded:
            padded = self.token_ids(probes) == self.clustered.vocab_size
            logits = mx.where(padded, mx.finfo(logits.dtype).min, logits)
        return Candidates(logits)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Scores (R, C) float32 → full logits (R, V) of the candidates' dtype. Tokens not probed
        get min(S_c - ln n_c, m - max(1, |m|/64)), with n_c tokens and the best logit m."""
        logits, (n_rows, n_clusters) = candidates.logits, scores.shape
        best = mx.max(logits, axis=(-2, -1), keepdims=True).squeeze(-1).astype(mx.float32)  # (R, 1)
        cap = best - mx.maximum(1.0, mx.abs(best) * MARGIN_SHARE)
        tail = mx.minimum(scores + self.clustered.centroids.tail_offset, cap)
        if logits.dtype == mx.float16:
            tail = mx.maximum(tail, mx.finfo(mx.float16).min)  # finite in float16 too
        blocks = mx.broadcast_to(tail[..., None], (n_rows, n_clusters, logits.shape[-1]))
        blocks = blocks.astype(logits.dtype)
        blocks = mx.put_along_axis(blocks, selection.probes[..., None], logits, axis=1)
        return in_token_order(blocks.reshape(n_rows, -1), self.clustered.slot_of)

    def choose(
        self, selection: Selection, candidates: Candidates, draws: Draws | None, risk: Risk = USUAL
    ) -> tuple[mx.array, mx.array]:
        """A token of each row, (R,) uint32: without ``draws`` the best logit, of equals the lowest
        id, NaN the highest; and (R,) float32, the ``risk`` that the dense head chooses another."""
        ids, logits = self.token_ids(selection.probes).flatten(1), candidates.logits.flatten(1)
        left, gumbel = cast(mx.array, selection.unscored), None
        if draws is not None:
            logits, gumbel = logits.astype(mx.float32), noise(draws.keys, ids)
        tokens = draw(logits, gumbel, draws, ids, left[:, 1])
        return tokens, risk.of(candidates, left, draws)

    def join(self, proposals: Sequence[Proposal], rows: Rows) -> tuple[mx.array, ...]:
        """The states, probes and logits of some rows of the proposals."""
        places = [(i, row) for i, each in enumerate(proposals) for row in range(len(each.hidden))]
        parts = zip(*((each.hidden, each.probes, each.logits) for each in proposals), strict=True)
        joined = tuple(mx.concatenate(list(arrays)) for arrays in parts)
        if list(rows) == places:
            return joined
        order = mx.array([places.index(row) for row in rows], mx.uint32)
        return tuple(array[order] for array in joined)

    def screen(
        self, slots: mx.array, proposal: Proposal, draws: Draws | None, rooms: Rooms, epsilon: float
    ) -> Screen:
        """Which proposals of k states are the dense choice for sure, by the logits of all slots.

        Greedy: the token's logit is above every other. Drawn: the filters keep the token, and no
        other that they may keep can have a higher noisy logit. metal/flash_head/screen.h has the
        rules. ``slots`` (k, C, n) are the logits of all states at once, in the order of the
        clusters; ``draws`` None where all states are greedy; ``epsilon`` is the relative spacing of
        log-probabilities, of which equal ones give the lowest id.
        """
        clustered, lowest = self.clustered, mx.finfo(mx.float32).min
        largest = mx.max(mx.abs(slots), axis=(1, 2)).astype(mx.float32)
        room, scored_room = (each[:, None] for each in rooms)
        others = slots.astype(mx.float32)
        others = mx.put_along_axis(others, proposal.probes[..., None], mx.array(-mx.inf), axis=1)
        if clustered.padded:
            others = mx.where(clustered.token_ids == clustered.vocab_size, -mx.inf, others)
        best = mx.maximum(mx.max(others, axis=(1, 2)), lowest)[:, None]
        tail = log_mass(others.flatten(1))
        ids, own_token = self.token_ids(proposal.probes).flatten(1), proposal.tokens[:, None]
        scored = proposal.logits.astype(mx.float32).flatten(1)
        own = mx.max(mx.where(ids == own_token, scored, -mx.inf), axis=-1, keepdims=True)
        rest = mx.where(ids == own_token, -mx.inf, scored)
        second = mx.maximum(mx.max(rest, axis=-1, keepdims=True), lowest)
        mass = log_mass(scored)
        bound = tail if epsilon > 1e-6 else best + mx.log(mx.array(clustered.vocab_size))
        most = mx.logaddexp(mass, bound + room)
        certain = (own - second > 2 * scored_room + (most - second + 0.5) * epsilon) & (
            own - best > room + scored_room + (most - best + 0.5) * epsilon
        )
        if draws is not None:
            inverse, share, log_min_p = mx.split(draws.settings, 3, axis=-1)
            count = draws.top_k[:, None]
            least = mx.exp(mx.logaddexp(mass - scored_room, tail - room) - own)
            most = mx.exp(mx.logaddexp(mass + scored_room, tail + room) - own)
            floor, high = own - scored_room, rest + scored_room
            # the mass of others above: their number times that of the best
            n_rivals = (others + room[..., None] > floor[..., None]).sum(axis=(1, 2))[:, None]
            above = mx.where(high > floor, mx.exp(high - own), 0).sum(axis=-1, keepdims=True)
            above = above + n_rivals * mx.exp(mx.minimum(best + room - own, 80))
            n_above = (high > floor).sum(axis=-1, keepdims=True) + n_rivals
            sure = (share >= 1) | (above < share * least * (1 - MASS_ROOM))
            sure &= (count == 0) | (n_above < count)
            sure &= floor >= mx.maximum(second + scored_room, best + room) + log_min_p
            worst = floor * inverse + noise(draws.keys, own_token)
            worst = worst - NOISE_ROOM * mx.maximum(1, mx.abs(worst))
            noisy = high * inverse + noise(draws.keys, ids)
            rival = mx.max(mx.where(noisy >= worst, high, -mx.inf), axis=-1, keepdims=True)
            left, near = self._rival(others, room, inverse, worst, draws)
            rival, cut = mx.maximum(rival, left), (worst - LIKELY_NOISE) / inverse
            over = scored - scored_room > rival
            mass_over = mx.where(over, mx.exp(scored - scored_room - own), 0).sum(axis=-1)[:, None]
            near_over = mx.where(near > cut, mx.exp(near - own), 0).sum(axis=-1, keepdims=True)
            mass_over = mass_over + mx.where(rival <= cut, near_over, 0)
            dropped = (share < 1) & (mass_over >= share * most * (1 + MASS_ROOM))
            dropped |= (count > 0) & (over.sum(axis=-1, keepdims=True) >= count)
            dropped |= rival < mx.maximum(floor, second - scored_room) + log_min_p
            sure &= (rival == -mx.inf) | dropped
            certain = mx.where(inverse == 0, certain, sure)
        certain = certain[:, 0] & (largest < mx.inf)  # float16 may overflow
        return Screen(certain, largest, best[:, 0], tail[:, 0])

    def _rival(
        self, others: mx.array, room: mx.array, inverse: mx.array, worst: mx.array, draws: Draws
    ) -> tuple[mx.array, mx.array]:
        """The highest logit that was not scored, (k, 1), whose noisy value reaches the worst of the
        token: of all, or where the draws have filters of the nearest clusters and any other. And
        the lowest that these logits may be, (k, K)."""
        clustered, left = self.clustered, mx.array(-mx.inf)
        if clustered.n_clusters > NEAREST and all(s.filters or s.greedy for s in draws.rows):
            bests = mx.max(others, axis=-1)
            order = mx.argpartition(-bests, kth=NEAREST, axis=-1)
            left = mx.take_along_axis(bests, order[:, NEAREST : NEAREST + 1], axis=-1) + room
            order = order[:, :NEAREST]
            others = mx.take_along_axis(others, order[..., None], axis=1).flatten(1)
            gumbel = noise(draws.keys, self.token_ids(order).flatten(1))
        else:
            others = in_token_order(others.flatten(1), clustered.slot_of)
            gumbel = noise_of_all(draws.keys, clustered.vocab_size)
        high = others + room
        reached = mx.where(high * inverse + gumbel >= worst, high, -mx.inf)
        return mx.maximum(left, mx.max(reached, axis=-1, keepdims=True)), others - room
