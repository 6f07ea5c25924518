"""The operations of a FlashHead as functions of MLX: route, select, score, expand, choose, screen.

They are the CPU path, the fallback, and the reference of the Metal kernels. Nothing here evaluates.

hidden (R, D) ─ route ─▶ scores (R, C) ─ select ─▶ probes (R, p)
              ─ score ─▶ logits (R, p·n) ─ expand ─▶ (R, V)   or   ─ choose ─▶ (R,)

A model may map each of its head's logits (``logit_map``). `score` gives the model's, without a map
the head's own; `expand` needs the head's own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from .adjustment import Adjustment, adjusted_logits, probed_for
from .clustered import ClusteredRows, in_columns, in_token_order
from .draws.bounds import LOWEST, Bounds, log_mass
from .draws.draw import Draw, Draws
from .logit_map import IDENTITY, LogitMap
from .matrix import Matrix
from .proposal import Candidates, Proposal, ProposalPosition, Screen, Selection, Tolerance, Unscored

# A depth in nats with which every probe is scored.
NO_DEPTH = 1e30
# The risk of a position at which no scored token may be chosen.
NOTHING_ALLOWED = 2.0
# The tail stays this far below the best candidate, so that greedy decoding returns a scored token.
# A cap at the maximum itself ties, and in bfloat16 so does a margin of 0.1.
MARGIN_SHARE = 1 / 64

# Multiply-adds of one state's product with a block: above about a million OpenBLAS copies the
# matrix first, which does not pay for few states (docs/how-it-works.md).
BLOCK_PRODUCTS = 500_000
# A block has a multiple of so many rows: whole vectors.
BLOCK_MULTIPLE = 16
# Fewer states are not multiplied as a matrix on any GPU that lacks bfloat16.
FLOAT16_FROM = 6


class Risk(NamedTuple):
    """The constants of the estimated risk that the dense head chooses another token.

    The risk follows from what was not scored. For the best token it is exp(a - b·gap) of the
    token's distance to the best score of the other clusters, for a draw ``scale`` times their mass.
    """

    a: float = 0.0
    b: float = 1.0
    scale: float = 1.0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Risk":
        """Reads an index's settings of verification; the usual numbers where there are none."""
        fitted = settings.get("risk") or {}
        a, b = fitted.get("greedy", USUAL[:2])
        return cls(a, b, fitted.get("sampled", USUAL.scale))

    def of_best(self, best: mx.array, unscored: Unscored, logit_map: LogitMap) -> mx.array:
        """Estimates the chance that a token with a better logit was not scored.

        Args:
            best: (R, 1) float32, the highest of the scored tokens' logits, mapped.
            unscored: What was not scored.
            logit_map: What the model does to each of its head's logits.

        Returns:
            (R, 1) float32.
        """
        if not logit_map.identity:
            best = logit_map.inverse(best)
        return mx.exp(self.a - self.b * (best - unscored.best))

    def of_draw(self, logits: mx.array, unscored: Unscored) -> mx.array:
        """Estimates the chance that a draw from all tokens is another one, by their masses.

        Args:
            logits: (R, K) float32, the scored tokens', mapped.
            unscored: What was not scored, with its mass.

        Returns:
            (R, 1) float32.
        """
        mass = cast(mx.array, unscored.mass)
        return self.scale * mx.sigmoid(mass - log_mass(logits))


USUAL = Risk()


def mapped_mass(scores: mx.array, logit_map: LogitMap, cluster_size: int) -> mx.array:
    """The log of the summed exponentials of all tokens of some clusters, (R, 1) float32.

    Args:
        scores: (R, N) float32, the log of the summed exponentials of each cluster's logits.
        logit_map: What the model does to the logits, if those of a cluster are all the same.
        cluster_size: Tokens of a cluster.
    """
    if not logit_map.identity:
        n_tokens = math.log(cluster_size)
        scores = logit_map(scores - n_tokens).astype(mx.float32) + n_tokens
    return mx.logsumexp(scores, axis=-1, keepdims=True)


def in_blocks(matrix: Matrix) -> mx.array:
    """Returns rows (V, D) as columns for ``blocked_product``: (n_blocks, D, block) float32.

    MLX's BLAS multiplies them in half the time. The last block repeats the last row. Lazy.
    """
    n_rows = matrix.n_rows
    n_blocks = -(-n_rows * matrix.hidden_size // BLOCK_PRODUCTS)
    block = BLOCK_MULTIPLE * -(-n_rows // (n_blocks * BLOCK_MULTIPLE))
    order = mx.minimum(mx.arange(n_blocks * block), n_rows - 1).reshape(n_blocks, block)
    return in_columns(matrix.dequantized(mx.float32), order).swapaxes(-1, -2)


def blocked_product(hidden: mx.array, columns: mx.array) -> mx.array:
    """Multiplies (R, D) with all columns (n_blocks, D, block) → (R, n_blocks·block).

    It is fast for few states.
    """
    products = hidden @ columns
    if len(hidden) > 1:
        products = products.swapaxes(0, 1)
    return products.reshape(len(hidden), -1)


class PortableOperations:
    """Each operation as functions of MLX."""

    name = "mlx"
    # All rows, for :meth:`verifying_product` on some GPUs.
    float16_rows: Matrix | None = None
    # Pending tokens that are joined before the launch of their verification; 0: then all at once.
    joined_early = 0

    def __init__(self, clustered: ClusteredRows):
        self.clustered = clustered
        # A score is the log of a cluster's summed exponentials. The product with a mean row alone,
        # without a bias, lacks so much of it at least: Jensen's inequality.
        self._lacking = math.log(clustered.cluster_size)
        if np.array(clustered.centroids.bias).any():
            self._lacking = 0.0
        self._on_cpu = mx.default_device().type == mx.cpu
        # The CPU build multiplies float32 far faster than 4 bits: it has floats of the centroids.
        self._centroids: mx.array | None = None
        if self._on_cpu:
            self._centroids = in_blocks(clustered.centroids.matrix)
        # This view is made once.
        self._columns = clustered.rows.weight.swapaxes(-1, -2)

    def arrays(self) -> list[mx.array]:
        """The arrays that the operations hold beside the rows."""
        held = [self._columns]
        if self._centroids is not None:
            held.append(self._centroids)
        return held

    def structure_of(
        self, draws: Draws, adjustment: Adjustment | None
    ) -> tuple[tuple[Draw, ...], int | None]:
        """What of draws and an adjustment changes the operations of a proposal.

        Returns:
            :attr:`Draws.structure`, and the number of the adjustment beside its arrays.
        """
        if adjustment is None:
            return draws.structure, None
        return draws.structure, adjustment.most_occurrences

    def product(self, hidden: mx.array) -> mx.array:
        """Logits of all slots, in their order: hidden (R, D) → (R, C·n)."""
        if not self.clustered.by_column:
            return self.clustered.flat_rows().matmul(hidden)
        rows = self.clustered.rows
        logits = blocked_product(hidden, rows.weight.swapaxes(-1, -2))
        if rows.bias is not None:
            logits = logits + rows.bias.reshape(-1)
        return logits

    def verifying_product(self, hidden: mx.array) -> mx.array:
        """Computes :meth:`product` for states that are verified, in clusters: (k, D) → (k, C, n).

        Another rounding is allowed: it computes in float16 where the rows are the same in it and a
        GPU lacks bfloat16.
        """
        if self.float16_rows is None or hidden.dtype != mx.bfloat16 or len(hidden) < FLOAT16_FROM:
            logits = self.product(hidden)
        else:
            logits = self.float16_rows.matmul(hidden.astype(mx.float16))
            logits = logits.astype(self.clustered.rows.logits_dtype(hidden.dtype))
        return logits.reshape(len(hidden), *self.clustered.token_ids.shape)

    def dense(self, hidden: mx.array) -> mx.array:
        """Computes logits of all tokens: hidden (R, D) → (R, V)."""
        return in_token_order(self.product(hidden), self.clustered.slot_of)

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
        self,
        scores: mx.array,
        n_probes: int,
        words: bool = True,
        depth: float = NO_DEPTH,
        logit_map: LogitMap = IDENTITY,
        adjustment: Adjustment | None = None,
        mass: bool = True,
    ) -> Selection:
        """Selects the ``n_probes`` best clusters of each position, unordered: (R, C) → (R, p).

        Args:
            scores: (R, C) float32.
            n_probes: The number of clusters to select.
            words: Whether kernels give words for `expand`.
            depth: Kernels leave clusters out that lie more than this number of nats below the
                log-sum-exp of all scores: at most C·exp(-depth) of the mass.
            logit_map: Makes the mass of the clusters that are left what the model's logits give.
            adjustment: Clusters of tokens that it changes are probed in any case, where
                ``n_probes`` has room.
            mass: Whether the mass of the clusters that are left is wanted, as draws need it.
        """
        if adjustment is not None:
            scores = probed_for(scores, adjustment, self.clustered)
        n_left = scores.shape[-1] - n_probes
        if n_left <= 0:
            nothing = mx.full((len(scores), 1), mx.finfo(mx.float32).min)
            probes = mx.broadcast_to(mx.arange(n_probes, dtype=mx.uint32), scores.shape)
            return Selection(probes, unscored=Unscored(nothing, nothing))
        # The last one before the probes is the best of the others.
        order = mx.argpartition(scores, kth=n_left - 1, axis=-1)
        probes = order[:, n_left:]
        if not mass:
            best_left = mx.take_along_axis(scores, order[:, n_left - 1 : n_left], axis=-1)
            return Selection(probes, unscored=Unscored(best_left, None))
        left = mx.take_along_axis(scores, order[:, :n_left], axis=-1)
        mass_left = mapped_mass(left, logit_map, self.clustered.cluster_size)
        return Selection(probes, unscored=Unscored(left[:, -1:], mass_left))

    def score(
        self, hidden: mx.array, selection: Selection, logit_map: LogitMap = IDENTITY
    ) -> Candidates:
        """Logits of the probed clusters' rows, mapped: hidden (R, D) → (R, p, n)."""
        rows = self.clustered.rows
        probes = selection.probes
        logits = self._products(hidden, probes)
        if rows.bias is not None:
            logits = logits + mx.take(rows.bias, probes, axis=0)
        logits = logit_map(logits)
        if self.clustered.padded:
            padded = self.token_ids(probes) == self.clustered.vocab_size
            logits = mx.where(padded, mx.finfo(logits.dtype).min, logits)
        return Candidates(logits)

    def _products(self, hidden: mx.array, probes: mx.array) -> mx.array:
        """Products of states (R, D) with the rows of their clusters (R, p): (R, p, n)."""
        rows = self.clustered.rows
        if self._on_cpu and rows.weight.dtype == hidden.dtype == mx.float32:
            return self._products_on_cpu(hidden, probes)
        # States (R, 1, 1, D) meet (R, p) blocks of (n, D).
        stacked = mx.expand_dims(hidden, (1, 2))
        if rows.scales is not None:
            products = mx.gather_qmm(
                stacked,
                rows.weight,
                rows.scales,
                rows.biases,
                rhs_indices=probes,
                transpose=True,
                **rows.quantization,
            )
            return products.squeeze(-2)
        if rows.weight.dtype == hidden.dtype and not self._on_cpu:
            return mx.gather_mm(stacked, self._columns, rhs_indices=probes).squeeze(-2)
        # For other floats the CPU build has no gather_mm. The blocks are (R, p, n, D).
        blocks = mx.take(rows.weight, probes, axis=0)
        return (blocks @ hidden[:, None, :, None]).squeeze(-1)

    def _products_on_cpu(self, hidden: mx.array, probes: mx.array) -> mx.array:
        """The same in float32: R states, each taken once for each of its clusters."""
        n_states = len(hidden)
        numbers = np.arange(n_states, dtype=np.uint32)[:, None]
        states = mx.array(np.repeat(numbers, probes.shape[1], axis=1))
        # The usual single state is one array that is there.
        stacked = hidden
        if n_states > 1:
            stacked = hidden[:, None]
        return mx.gather_mm(stacked, self._columns, states, probes).squeeze(-2)

    def adjust(
        self,
        selection: Selection,
        candidates: Candidates,
        adjustment: Adjustment | None,
        allowed: mx.array | None,
    ) -> Candidates:
        """The scored logits after biases and penalties and a mask.

        Args:
            selection: Clusters that hold all tokens that the adjustment changes.
            candidates: The model's logits of their tokens, (R, p, n).
            adjustment: Of R positions, or None.
            allowed: (R, ⌈V/32⌉) uint32, a bit a token, the lowest first; None where all may be
                chosen. Others get the lowest finite value.
        """
        logits = candidates.logits
        probes = selection.probes
        if adjustment is not None:
            logits = adjusted_logits(logits, probes, adjustment, self.clustered)
        if allowed is not None:
            ids = self.token_ids(probes)
            # A padded slot has any word.
            index = mx.minimum(ids.flatten(1) // 32, allowed.shape[1] - 1)
            words = mx.take_along_axis(allowed, index, axis=1).reshape(ids.shape)
            may = (words >> (ids % 32)) & 1 != 0
            logits = mx.where(may, logits, mx.finfo(logits.dtype).min)
        return Candidates(logits)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Expands scores (R, C) float32 to full logits (R, V) of the candidates' dtype.

        Tokens not probed get min(S_c - ln n_c, m - max(1, |m|/64)), with n_c tokens and the best
        logit m.
        """
        logits = candidates.logits
        n_positions, n_clusters = scores.shape
        # The best logits are (R, 1).
        best = mx.max(logits, axis=(-2, -1), keepdims=True).squeeze(-1).astype(mx.float32)
        cap = best - mx.maximum(1.0, mx.abs(best) * MARGIN_SHARE)
        tail = mx.minimum(scores + self.clustered.centroids.tail_offset, cap)
        if logits.dtype == mx.float16:
            # The tail is finite in float16 too.
            tail = mx.maximum(tail, mx.finfo(mx.float16).min)
        blocks = mx.broadcast_to(tail[..., None], (n_positions, n_clusters, logits.shape[-1]))
        blocks = blocks.astype(logits.dtype)
        blocks = mx.put_along_axis(blocks, selection.probes[..., None], logits, axis=1)
        return in_token_order(blocks.reshape(n_positions, -1), self.clustered.slot_of)

    def choose(
        self,
        selection: Selection,
        candidates: Candidates,
        draws: Draws,
        risk: Risk = USUAL,
        logit_map: LogitMap = IDENTITY,
        masked: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Chooses a token at each position, with the risk that the dense head chooses another.

        The candidates and what was not scored are mapped already, by ``logit_map``.

        Args:
            selection: The clusters, and what was not scored.
            candidates: The scored logits.
            draws: Of R positions.
            risk: Estimates the risk by what was not scored.
            logit_map: What the model does to each of its head's logits.
            masked: Whether the candidates are masked. The risk is then NOTHING_ALLOWED if all
                scored tokens are, and the filters do not count what was not scored.

        Returns:
            The tokens (R,) uint32, and their risks (R,) float32.
        """
        ids = self.token_ids(selection.probes).flatten(1)
        logits = candidates.logits.flatten(1)
        nothing = mx.finfo(logits.dtype).min
        unscored = cast(Unscored, selection.unscored)

        def choose_of(
            kind: type[Draw], some: Draws, given: tuple[mx.array, mx.array, Unscored]
        ) -> tuple[mx.array, mx.array]:
            logits, ids, unscored = given
            scored = logits.astype(mx.float32)
            best = mx.max(scored, axis=-1, keepdims=True)
            others = None
            if some.filters and not masked:
                others = cast(mx.array, unscored.mass)
                if kind.whole_mass and self._lacking:
                    others = others + self._lacking
            tokens = kind.choose(scored, some, ids, others)
            if kind.by_mass:
                chance = risk.of_draw(scored, unscored)
            else:
                chance = risk.of_best(best, unscored, logit_map)
            chance = mx.where(best <= nothing, NOTHING_ALLOWED, mx.minimum(chance, 1.0))
            return tokens, chance[:, 0]

        tokens, risks = draws.by_kind((logits, ids, unscored), choose_of)
        if masked:
            # Where all is ruled out, a number may fall in the share of a padded slot.
            tokens = mx.minimum(tokens, self.clustered.vocab_size - 1)
        return tokens, risks

    def join(
        self, proposals: Sequence[Proposal], positions: Sequence[ProposalPosition]
    ) -> tuple[mx.array, ...]:
        """The states, probes and logits of some positions of the proposals."""
        joined = (
            mx.concatenate([each.hidden for each in proposals]),
            mx.concatenate([each.probes for each in proposals]),
            mx.concatenate([each.logits for each in proposals]),
        )
        every = []
        for number, proposal in enumerate(proposals):
            every += [(number, i) for i in range(len(proposal.hidden))]
        if list(positions) == every:
            return joined
        order = mx.array([every.index(position) for position in positions], mx.uint32)
        return tuple(array[order] for array in joined)

    def tolerances(
        self, hidden: mx.array, longest: float, product: float, scored: float
    ) -> tuple[mx.array, mx.array]:
        """How far logits of states may be off, by the states' lengths.

        Args:
            hidden: (k, D).
            longest: Length of the longest row, with its bias.
            product: Share of both lengths by which a logit of a product may be off.
            scored: Share of both by which a scored logit may be off.

        Returns:
            Two arrays, (k,) float32, of a product's logits and of scored ones.
        """
        norms = mx.linalg.norm(hidden.astype(mx.float32), axis=-1)
        lengths = (norms + 1) * longest
        return product * lengths, scored * lengths

    def screen(
        self,
        slots: mx.array,
        proposal: Proposal,
        draws: Draws,
        tolerance: Tolerance,
        epsilon: float,
        logit_map: LogitMap = IDENTITY,
        allowed: mx.array | None = None,
    ) -> Screen:
        """Which proposals of k states are the dense choice for sure, by the logits of all slots.

        Greedy: the token's logit is above every other. Drawn: the filters keep the token, and no
        other that they may keep can have a higher noisy logit. metal/flash_head/certain.h has the
        rules.

        Args:
            slots: (k, C, n), the head's logits of all states at once, in the order of the clusters.
            proposal: Of k positions, with the model's logits of the scored tokens.
            draws: Of k positions.
            tolerance: How far the logits may be off.
            epsilon: The relative spacing of the model's log-probabilities. Among equal ones the
                lowest id wins.
            logit_map: What the model does to each of its head's logits.
            allowed: (k, ⌈V/32⌉) uint32, a bit a token, the lowest first, whether it may be chosen;
                None where all may. The proposal's logits of others are the lowest finite value.
        """
        unscored = self._not_scored(slots, proposal, allowed)
        best = mx.max(unscored, axis=(1, 2)).astype(mx.float32)
        best = mx.maximum(best, LOWEST)[:, None]
        bounds = Bounds.of(self.clustered, proposal, unscored, best, tolerance, epsilon, logit_map)
        largest = mx.max(mx.abs(slots), axis=(1, 2)).astype(mx.float32)
        # Float16 may overflow.
        certain = draws.certain(bounds) & (largest < mx.inf)
        return Screen(certain, largest, best[:, 0], bounds.unscored_mass[:, 0])

    def _not_scored(
        self, slots: mx.array, proposal: Proposal, allowed: mx.array | None
    ) -> mx.array:
        """The slots' logits (k, C, n); minus infinity for what is scored, padded or masked."""
        clustered = self.clustered
        nothing = mx.array(-mx.inf, slots.dtype)
        others = mx.put_along_axis(slots, proposal.probes[..., None], nothing, axis=1)
        if clustered.padded:
            others = mx.where(clustered.token_ids == clustered.vocab_size, nothing, others)
        if allowed is not None:
            # A padded slot has any word.
            index = mx.minimum(clustered.token_ids // 32, allowed.shape[1] - 1)
            words = mx.take(allowed, index, axis=1)
            may = (words >> (clustered.token_ids % 32)) & 1 != 0
            others = mx.where(may, others, nothing)
        return others
