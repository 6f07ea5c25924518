"""The operations of a FlashHead as Metal kernels of ``metal/flash_head/``, one dispatch each."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .adjustment import Adjustment
from .clustered import ClusteredRows
from .dense_kernels import Version
from .draws.draw import Draw, Draws
from .draws.noise import Noise
from .kernel_inputs import (
    MIN_PROBES,
    SHORTEST,
    UNSCORED,
    long_enough,
    no_mask,
    nothing_changed,
)
from .kernel_texts import (
    EXPAND_TOKENS,
    JOINED,
    ROUTE_SIMDGROUPS,
    ROW_THREADS,
    ROWS,
    SCREEN_CLUSTERS,
    TALLIED,
    WIDE_THREADS,
)
from .kernels import make_kernels
from .logit_map import IDENTITY, LogitMap
from .operations import NO_DEPTH, USUAL, PortableOperations, Risk
from .proposal import Candidates, Proposal, ProposalPosition, Screen, Selection, Tolerance, Unscored
from .stored_rows import StoredRows

# So many positions share one reading of the centroids.
SHARED_POSITIONS = 4
# Positions from which MLX's own product routes: its matrix kernels begin at 6 to 13 positions.
# Source: get_qmv_batch_limit in mlx/backend/metal/quantized.cpp.
MATRIX_FROM = 12
# It stands for any draw of a kernel.
ANY_DRAW = Noise(temperature=1.0)

# A proposal with tolerances: of the product, of scored logits, and relative.
ScreenInputs = tuple[Proposal, mx.array, mx.array, mx.array]


class MetalOperations(PortableOperations):
    """The operations of ``PortableOperations``, each one Metal kernel.

    A position holds max(p, 8) probes; beyond p the last one is repeated.

    Args:
        clustered: The rows.
        metal_kernel: Makes the kernels; None: ``mx.fast.metal_kernel``.
        row_threads: Threads of a threadgroup of the kernels that have one for each position.
        version: Of the MLX whose sums the scores have; None: the installed one.
    """

    name = "metal"
    # The launch joins the results of these, and the last tokens.
    joined_early = JOINED - 1

    def __init__(
        self,
        clustered: ClusteredRows,
        metal_kernel: Callable[..., Any] | None = None,
        row_threads: int = ROW_THREADS,
        version: Version | None = None,
    ):
        super().__init__(clustered)
        self.row_threads = row_threads
        self.metal_kernel: Callable[..., Any] = metal_kernel or mx.fast.metal_kernel
        # Where kernels do not read the rows, `score` stays plain.
        self.reads_rows = clustered.rows.format.metal is not None
        self._tail_offset = clustered.centroids.tail_offset.astype(mx.float32)
        self._stored_centroids = StoredRows(clustered.centroids.matrix, clustered.n_clusters)
        self._stored_rows: StoredRows | None = None
        if self.reads_rows:
            self._stored_rows = StoredRows(clustered.rows, clustered.vocab_size, version)
        self._kernels = make_kernels(
            clustered, self._stored_centroids, self._stored_rows, self.metal_kernel, row_threads
        )

    def arrays(self) -> list[mx.array]:
        """The arrays that the operations hold beside the rows."""
        return [*super().arrays(), self._tail_offset]

    def structure_of(
        self, draws: Draws, adjustment: Adjustment | None
    ) -> tuple[tuple[Draw, ...], int | None]:
        """What changes the launches of a proposal: kernels read all settings from arrays."""
        structure = draws.structure
        if draws.have_kernels and not draws.all_greedy:
            structure = (ANY_DRAW,) * len(structure)
        if adjustment is None:
            return structure, None
        return structure, 0

    def route(self, hidden: mx.array) -> mx.array:
        """Scores all clusters: hidden (R, D) → (R, C) float32."""
        n_positions = len(hidden)
        n_clusters = self.clustered.n_clusters
        if n_positions >= MATRIX_FROM:
            return super().route(hidden)
        shared = SHARED_POSITIONS
        if n_positions == 1:
            shared = 1
        x = -(-n_clusters // (ROWS * ROUTE_SIMDGROUPS))
        y = -(-n_positions // shared)
        arrays = [hidden, *self._stored_centroids.arrays, self.clustered.route_bias]
        result = (n_positions, n_clusters), mx.float32
        (scores,) = self._kernels["route"](arrays, x, y, result, H=shared, SUM=mx.float32)
        return scores

    def mapped(self, values: mx.array, logit_map: LogitMap) -> mx.array:
        """Maps each of the values (n,), at least 8 of them, as the kernels do."""
        groups = -(-len(values) // WIDE_THREADS)
        result = values.shape, logit_map.result_dtype(values.dtype)
        template = logit_map.template(values.dtype)
        (mapped,) = self._kernels["map"]([values], groups, 1, result, **template)
        return mapped

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
        """Selects the ``n_probes`` best clusters of each position, ascending, and the tail.

        Where scores differ by less than 1/64 nat, the lower id counts as the better cluster. The
        mass costs a kernel nothing, and is always there.
        """
        n_positions, n_clusters = scores.shape
        if not self.reads_rows:
            # The portable operation would read the repeated probes.
            depth = NO_DEPTH
        name = "select"
        more: list[mx.array] = []
        probed = (n_positions, max(n_probes, MIN_PROBES)), mx.uint32
        results = [probed, ((n_positions, UNSCORED), mx.float32)]
        if words:
            name = "select_words"
            more = [self._tail_offset]
            results.append(((n_positions, n_clusters), mx.uint32))
        elif adjustment is not None:
            name = "select_forced"
            more = [adjustment.words, long_enough(adjustment.latest), self.clustered.slot_of]
        arrays = [scores, *more, mx.array(n_probes, mx.uint32), mx.array(depth, mx.float32)]
        template = logit_map.template(mx.float32)
        made = self._kernels[name](arrays, 1, n_positions, *results, **template)
        probes, unscored = made[:2]
        left = Unscored(unscored[:, :1], unscored[:, 1:2])
        selection = Selection(probes, None, left, unscored)
        if words:
            selection = selection._replace(words=made[2])
        return selection

    def score(
        self, hidden: mx.array, selection: Selection, logit_map: LogitMap = IDENTITY
    ) -> Candidates:
        """Computes the logits of the probed clusters' rows, mapped: hidden (R, D) → (R, p, n)."""
        if self._stored_rows is None:
            logits = super().score(hidden, selection, logit_map).logits
            return Candidates(logits, mx.max(logits, axis=-1).astype(mx.float32))
        probes = selection.probes
        rows = self.clustered.rows
        n_positions, n_probed = probes.shape
        shape = n_positions, n_probed, self.clustered.cluster_size
        raw = rows.logits_dtype(hidden.dtype)
        results = (shape, logit_map.result_dtype(raw)), (shape[:2], mx.float32)
        product = rows.product_dtype(hidden.dtype)
        sums = mx.float32
        if self._stored_rows.kernel.added > 1:
            sums = product
        template = {"PRODUCT": product, "SUM": sums, "RAW": raw, **logit_map.template(raw)}
        arrays = [hidden, probes, self.clustered.token_ids, *self._stored_rows.arrays]
        logits, best = self._kernels["score"](arrays, n_probed, n_positions, *results, **template)
        return Candidates(logits, best)

    def adjust(
        self,
        selection: Selection,
        candidates: Candidates,
        adjustment: Adjustment | None,
        allowed: mx.array | None,
    ) -> Candidates:
        """Applies biases, penalties and a mask to the scored logits (R, p, n)."""
        logits = candidates.logits
        probes = selection.probes
        n_positions, n_probed = probes.shape
        words, latest = nothing_changed(n_positions, self.clustered.vocab_size)
        if adjustment is not None:
            words = adjustment.words
            latest = long_enough(adjustment.latest)
        mask = no_mask(self.clustered.vocab_size)
        if allowed is not None:
            mask = long_enough(allowed).reshape(-1, allowed.shape[-1])
        arrays = [probes, self.clustered.token_ids, logits, words, latest, mask]
        groups = -(-n_probed // WIDE_THREADS)
        results = (logits.shape, logits.dtype), ((n_positions, n_probed), mx.float32)
        logits, best = self._kernels["adjust"](
            arrays, groups, n_positions, *results, T=logits.dtype
        )
        return Candidates(logits, best)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Expands scores (R, C) float32 to full logits (R, V) of the candidates' dtype."""
        if selection.words is None:
            return super().expand(scores, selection, candidates)
        logits = candidates.logits
        vocab_size = self.clustered.vocab_size
        arrays = [selection.words, self.clustered.slot_of, logits, candidates.best]
        groups = -(-vocab_size // (WIDE_THREADS * EXPAND_TOKENS))
        result = (len(logits), vocab_size), logits.dtype
        (expanded,) = self._kernels["expand"](arrays, groups, len(logits), result)
        return expanded

    def choose(
        self,
        selection: Selection,
        candidates: Candidates,
        draws: Draws,
        risk: Risk = USUAL,
        logit_map: LogitMap = IDENTITY,
        masked: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Chooses a token at each position, (R,) uint32, with its risk, (R,) float32."""
        if not draws.have_kernels:
            return super().choose(selection, candidates, draws, risk, logit_map, masked)
        logits = candidates.logits
        n_positions = len(logits)
        # Where tokens are masked, the filters do not count what was not scored.
        counted = 1.0
        if masked:
            counted = 0.0
        settings, top_k, keys = draws.inputs
        arrays = [
            selection.probes,
            self.clustered.token_ids,
            logits,
            candidates.best,
            selection.unscored_input,
            settings,
            top_k,
            keys,
            mx.array([*risk, counted]),
        ]
        results = ((n_positions,), mx.uint32), ((n_positions,), mx.float32)
        template = {"T": logits.dtype, **logit_map.template(logits.dtype)}
        tokens, chances = self._kernels["sample"](arrays, 1, n_positions, *results, **template)
        return tokens, chances

    def join(
        self, proposals: Sequence[Proposal], positions: Sequence[ProposalPosition]
    ) -> tuple[mx.array, ...]:
        """Joins the states, probes and logits of some positions of the proposals."""
        if len(proposals) > JOINED or proposals[0].probes.shape[-1] < MIN_PROBES:
            return super().join(proposals, positions)
        first = proposals[0]
        unused = [first] * (JOINED - len(proposals))
        arrays = []
        for source in [*proposals, *unused]:
            arrays += [source.hidden, source.probes, source.logits]
        results = []
        for array in (first.hidden, first.probes, first.logits):
            shape = (len(positions), *array.shape[1:])
            results.append((shape, array.dtype))
        missing = SHORTEST - len(positions)
        filled = [*positions, *[positions[-1]] * missing]
        arrays.append(mx.array(filled, mx.uint32))
        joined = self._kernels["join"](arrays, JOINED, len(positions), *results)
        return tuple(joined)

    def tolerances(
        self, hidden: mx.array, longest: float, product: float, scored: float
    ) -> tuple[mx.array, mx.array]:
        """Computes how far logits of states (k, D) may be off: two arrays (k,) float32."""
        k = len(hidden)
        shares = mx.array([product, scored, longest], mx.float32)
        result = (k,), mx.float32
        of_product, of_scored = self._kernels["tolerance"]([hidden, shares], 1, k, result, result)
        return of_product, of_scored

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
        """Finds which proposals of k states are the dense choice for sure.

        It takes the logits (k, C, n) of all slots.
        """
        if not draws.have_kernels:
            return super().screen(slots, proposal, draws, tolerance, epsilon, logit_map, allowed)
        inputs = screen_inputs(proposal, tolerance)
        parts = self.tallies(slots, inputs, draws, logit_map, allowed)
        proposal, of_product, of_scored, relative = inputs
        settings, top_k, keys = draws.inputs
        arrays = [
            parts,
            proposal.probes,
            self.clustered.token_ids,
            proposal.logits,
            proposal.tokens,
            settings,
            top_k,
            keys,
            of_product,
            of_scored,
            relative,
            mx.array(epsilon, mx.float32),
        ]
        n_states = len(slots)
        results = ((n_states,), mx.bool_), ((n_states, 3), mx.float32)
        template = {"T": proposal.logits.dtype, **logit_map.template(slots.dtype)}
        sure, known = self._kernels["certain"](arrays, 1, n_states, *results, **template)
        return Screen(
            certain=sure,
            largest=known[:, 0],
            best_unscored=known[:, 1],
            unscored_mass=known[:, 2],
        )

    def tallies(
        self,
        slots: mx.array,
        inputs: ScreenInputs,
        draws: Draws,
        logit_map: LogitMap = IDENTITY,
        allowed: mx.array | None = None,
    ) -> mx.array:
        """Runs the first kernel of :meth:`screen`.

        Returns:
            (k, parts, TALLIED) float32: of each part of the clusters the largest logit, the best
            that was not scored, and so on.
        """
        proposal, of_product, of_scored, relative = inputs
        settings, _, keys = draws.inputs
        slot_of = self.clustered.slot_of
        # Without a mask it is any array, which is not read.
        mask = slot_of
        if allowed is not None:
            mask = long_enough(allowed)
        arrays = [
            slots,
            proposal.probes,
            self.clustered.token_ids,
            slot_of,
            proposal.logits,
            proposal.tokens,
            settings,
            keys,
            of_product,
            of_scored,
            relative,
            mask,
        ]
        n_states = len(slots)
        n_parts = -(-self.clustered.n_clusters // SCREEN_CLUSTERS)
        result = (n_states, n_parts, TALLIED), mx.float32
        template = {"MASKED": allowed is not None, **logit_map.template(slots.dtype)}
        (tallies,) = self._kernels["screen"](arrays, n_parts, n_states, result, **template)
        return tallies


def screen_inputs(proposal: Proposal, tolerance: Tolerance) -> ScreenInputs:
    """What both kernels of a screen take of a proposal and a tolerance, none of it short."""
    filled = proposal.filled(MIN_PROBES)
    filled = filled._replace(tokens=long_enough(filled.tokens))
    of_product = long_enough(tolerance.product)
    of_scored = long_enough(tolerance.scored)
    relative = mx.array(tolerance.relative, mx.float32)
    return filled, of_product, of_scored, relative
