"""The steps of a FlashHead as Metal kernels of ``metal/flash_head/``, one dispatch each."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from . import kernel_text as text
from .adjustment import ADJUST_HEAD, Adjustment
from .clustered import ClusteredRows
from .dense_kernels import DenseKernel, dense_kernel
from .draw import Draws
from .kernel_text import ROW_THREADS
from .logit_map import IDENTITY, LogitMap
from .matrix import Matrix
from .proposal import Candidates, Proposal, Rows, Screen, Selection, Tolerance
from .short_inputs import HELD, held
from .steps import NO_DEPTH, USUAL, PortableSteps, Risk

# The constants of the same names in metal/flash_head/constants.h.
LANES = 32
ROWS = 4
ROUTE_SIMDGROUPS = 2
SCORE_SIMDGROUPS = 8
WIDE_THREADS = 256
EXPAND_TOKENS = 4
SCREEN_CLUSTERS = 1024
TALLIED = 10
MIN_PROBES = HELD
UNSCORED = HELD

JOINED = 8  # sources of a join: Metal has 31 buffers
SHARED_POSITIONS = 4  # that share one reading of the centroids
# Positions from which MLX's own product routes: its matrix kernels begin at 6 to 13 positions.
# Source: get_qmv_batch_limit in mlx/backend/metal/quantized.cpp.
MATRIX_FROM = 12


class _StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them."""

    def __init__(self, stored: Matrix, n_rows: int):
        maker = cast(str, stored.format.metal)
        names = stored.format.arrays
        self.kernel: DenseKernel = dense_kernel(stored, n_rows)
        self.inputs = " ".join(names)
        self.arrays = [stored.arrays()[name] for name in names]
        self.sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            # qmv_quad takes more: then only the order of the sums is another one
            self.sizes["WORDS"] = max(1, self.kernel.packs)
        self.names = " ".join(name for name in self.sizes if name in maker)
        self.expression = f"flash_head::{maker}({', '.join(names)})"
        self.files = f"{maker.partition('_rows')[0]} dot"


class MetalSteps(PortableSteps):
    """The steps of ``PortableSteps``, each one Metal kernel.

    A position holds max(p, 8) probes; beyond p the last one is repeated.

    Args:
        clustered: The rows.
        metal_kernel: Makes the kernels; None: ``mx.fast.metal_kernel``.
        row_threads: Threads of a threadgroup of the kernels that have one for each position.
    """

    name = "metal"

    def __init__(
        self,
        clustered: ClusteredRows,
        metal_kernel: Callable[..., Any] | None = None,
        row_threads: int = ROW_THREADS,
    ):
        super().__init__(clustered)
        self.row_threads = row_threads
        self.metal_kernel: Callable[..., Any] = metal_kernel or mx.fast.metal_kernel
        self.reads_rows = clustered.rows.format.metal is not None  # else `score` stays plain
        self._tail_offset = clustered.centroids.tail_offset.astype(mx.float32)
        n_rows = clustered.vocab_size
        n_clusters, size = clustered.token_ids.shape
        self._sizes = {"V": n_rows, "C": n_clusters, "N": size, "D": clustered.rows.hidden_size}
        self._sizes["PADDED"] = clustered.padded
        self._make_route()
        if self.reads_rows:
            self._make_score()
        self._make_selects()
        self._make_proposals()
        self._make_verifications()

    def _make_route(self) -> None:
        """The kernel that scores the centroids."""
        clustered = self.clustered
        stored = _StoredRows(clustered.centroids.matrix, clustered.n_clusters)
        self._route_arrays = [*stored.arrays, clustered.route_bias]
        inputs = f"hidden {stored.inputs} route_bias"
        body = text.ROUTE_BODY.format(rows=stored.expression)
        self._sizes |= stored.sizes
        form = (f"{stored.files} route", LANES * ROUTE_SIMDGROUPS, f"D C {stored.names}")
        self._route = self._kernel("route", inputs, "scores", body, *form)

    def _make_score(self) -> None:
        """The kernel that scores the rows of the probes."""
        clustered = self.clustered
        stored = _StoredRows(clustered.rows, clustered.vocab_size)
        bias = [] if clustered.rows.bias is None else [clustered.rows.bias]
        self._adds_in_dtype = stored.kernel.added > 1
        self._score_arrays = [clustered.token_ids, *stored.arrays, *bias]
        inputs = f"hidden probes token_ids {stored.inputs}" + " bias" * len(bias)
        threads = LANES * min(SCORE_SIMDGROUPS, -(-clustered.cluster_size // ROWS))
        self._sizes |= stored.sizes
        form = (f"{stored.files} score", threads, f"D N V PADDED {stored.names}")
        body = text.SCORE_BODY.format(
            rows=stored.expression, bias="bias" if bias else "flash_head::NoBias{}"
        )
        self._score = self._kernel("score", inputs, "logits best", body, *form)

    def _make_selects(self) -> None:
        """The kernels that select clusters: alone, with some that must be, with all as bits."""
        form = ("histogram select", self.row_threads, "C N")
        body = text.SELECT_BODY.format(marks="", words="NoWords{}", forced="NotForced{}")
        inputs = "scores n_probes depth"
        self._select = self._kernel("select", inputs, "probes unscored", body, *form)
        body = text.SELECT_BODY.format(marks=text.MARKS, words="NoWords{}", forced=text.FORCED)
        inputs = "scores adjustment latest slot_of n_probes depth"
        form = ("histogram select", self.row_threads, "C N V")
        outputs = "probes unscored"
        self._select_forced = self._kernel("select_forced", inputs, outputs, body, *form)
        form = ("histogram select", self.row_threads, "C N")
        words = "cluster_words(words, tail_offset)"
        body = text.SELECT_BODY.format(marks="", words=words, forced="NotForced{}")
        inputs = "scores tail_offset n_probes depth"
        outputs = "probes unscored words"
        self._select_words = self._kernel("select_words", inputs, outputs, body, *form)

    def _make_proposals(self) -> None:
        """The kernels that change scored logits, choose by them, and keep what they have chosen."""
        inputs = "words slot_of logits best"
        form = ("expand", WIDE_THREADS, "V C N")
        self._expand = self._kernel("expand", inputs, "expanded", text.EXPAND_BODY, *form)
        inputs = "probes token_ids logits best unscored settings top_k keys fit"
        form = ("histogram noise sample", self.row_threads, "N V")
        self._sample = self._kernel("sample", inputs, "tokens risk", text.SAMPLE_BODY, *form)
        inputs = " ".join(f"hidden_{i} probes_{i} logits_{i}" for i in range(JOINED)) + " rows"
        body = "\n".join(text.JOIN_CASE.format(i=i) for i in range(JOINED))
        body = text.JOIN_BODY.format(cases=body)
        form = ("join", WIDE_THREADS, "D N")
        self._join = self._kernel("join", inputs, "hidden probes logits", body, *form)
        inputs = "probes token_ids logits adjustment latest allowed"
        form = ("adjust", WIDE_THREADS, "N V")
        self._adjust = self._kernel("adjust", inputs, "changed best", text.ADJUST_BODY, *form)

    def _make_verifications(self) -> None:
        """The kernels that judge proposals by the dense logits."""
        inputs = "slots probes token_ids slot_of logits tokens settings keys room scored_room"
        inputs += " relative allowed"
        form = ("noise screen", WIDE_THREADS, "C N V PADDED")
        self._screen = self._kernel("screen", inputs, "parts", text.SCREEN_BODY, *form)
        inputs = "parts probes token_ids logits tokens settings top_k keys room scored_room"
        inputs += " relative epsilon"
        form = ("noise screen", self.row_threads, "N V")
        self._certain = self._kernel("certain", inputs, "sure known", text.CERTAIN_BODY, *form)
        form = ("tolerance", WIDE_THREADS, "D")
        inputs = "hidden shares"
        outputs = "product scored"
        self._tolerance = self._kernel("tolerance", inputs, outputs, text.TOLERANCE_BODY, *form)
        self._map = self._kernel("map", "values", "mapped", text.MAP_BODY, "", WIDE_THREADS, "")

    def arrays(self) -> list[mx.array]:
        """The arrays that the steps hold beside the rows."""
        return [*super().arrays(), self._tail_offset]

    def _kernel(
        self, name: str, inputs: str, outputs: str, body: str, files: str, threads: int, sizes: str
    ) -> Callable[..., list[mx.array]]:
        """Makes a function that launches (x, y) threadgroups of ``threads``.

        The function takes the arrays of the inputs, and the shape and dtype of each output.
        ``sizes`` and ``more`` are template arguments.
        """
        kernel = self.metal_kernel(
            name=f"flash_head_{name}",
            input_names=inputs.split(),
            output_names=outputs.split(),
            header=text.header(*files.split(), row_threads=self.row_threads),
            source=body,
        )
        known = [(size, self._sizes[size]) for size in sizes.split()]

        def launch(
            arrays: list[mx.array],
            x: int,
            y: int,
            *results: tuple[tuple[int, ...], mx.Dtype],
            **more: Any,
        ) -> list[mx.array]:
            outputs: list[mx.array] = kernel(
                inputs=arrays,
                template=[*known, *more.items()],
                grid=(threads * x, y, 1),
                threadgroup=(threads, 1, 1),
                output_shapes=[shape for shape, _ in results],
                output_dtypes=[dtype for _, dtype in results],
            )
            return outputs

        return launch

    def route(self, hidden: mx.array) -> mx.array:
        """Scores all clusters: hidden (R, D) → (R, C) float32."""
        n_positions = len(hidden)
        n_clusters = self.clustered.n_clusters
        if n_positions >= MATRIX_FROM:
            return super().route(hidden)
        shared = 1 if n_positions == 1 else SHARED_POSITIONS
        groups = -(-n_clusters // (ROWS * ROUTE_SIMDGROUPS)), -(-n_positions // shared)
        scores = (n_positions, n_clusters), mx.float32
        arrays = [hidden, *self._route_arrays]
        return self._route(arrays, *groups, scores, H=shared, SUM=mx.float32)[0]

    def mapped(self, values: mx.array, logit_map: LogitMap) -> mx.array:
        """Each of the values (n,) mapped as the kernels do it: at least 8 of them."""
        template = logit_map.template(values.dtype)
        groups = -(-len(values) // WIDE_THREADS)
        result = values.shape, logit_map.result_dtype(values.dtype)
        return self._map([values], groups, 1, result, **template)[0]

    def select(
        self,
        scores: mx.array,
        n_probes: int,
        words: bool = True,
        depth: float = NO_DEPTH,
        logit_map: LogitMap = IDENTITY,
        adjustment: Adjustment | None = None,
        mass: bool = True,  # which costs a kernel nothing
    ) -> Selection:
        """Selects the ``n_probes`` best clusters of each row, ascending, and the tail.

        Of clusters that differ by less than 1/64 nat those of lower ids count as better.
        """
        n_positions, n_clusters = scores.shape
        if not self.reads_rows:
            depth = NO_DEPTH  # MLX's operations would read the repeated probes
        words = words and adjustment is None  # then MLX's operations expand
        arrays = [mx.array(n_probes, dtype=mx.uint32), mx.array(depth, dtype=mx.float32)]
        probed = (n_positions, max(n_probes, MIN_PROBES)), mx.uint32
        results = [probed, ((n_positions, UNSCORED), mx.float32)]
        if words:
            arrays = [scores, self._tail_offset, *arrays]
            kernel = self._select_words
            results.append(((n_positions, n_clusters), mx.uint32))
        elif adjustment is not None:
            changes = [adjustment.words, held(adjustment.latest), self.clustered.slot_of]
            arrays = [scores, *changes, *arrays]
            kernel = self._select_forced
        else:
            arrays = [scores, *arrays]
            kernel = self._select
        template = logit_map.template(mx.float32)
        probes, unscored, *made = kernel(arrays, 1, n_positions, *results, **template)
        return Selection(probes, made[0] if words else None, unscored)

    def score(
        self, hidden: mx.array, selection: Selection, logit_map: LogitMap = IDENTITY
    ) -> Candidates:
        """Computes the logits of the probed clusters' rows, mapped: hidden (R, D) → (R, p, n)."""
        if not self.reads_rows:
            logits = super().score(hidden, selection, logit_map).logits
            return Candidates(logits, mx.max(logits, axis=-1).astype(mx.float32))
        probes = selection.probes
        rows = self.clustered.rows
        n_positions, n_held = probes.shape
        shape = n_positions, n_held, self.clustered.cluster_size
        raw = rows.logits_dtype(hidden.dtype)
        results = (shape, logit_map.result_dtype(raw)), (shape[:2], mx.float32)
        product = rows.product_dtype(hidden.dtype)
        sums = product if self._adds_in_dtype else mx.float32
        template = {"PRODUCT": product, "SUM": sums, "RAW": raw, **logit_map.template(raw)}
        arrays = [hidden, probes, *self._score_arrays]
        logits, best = self._score(arrays, n_held, n_positions, *results, **template)
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
        n_positions, n_held = probes.shape
        ids = self.clustered.token_ids
        if adjustment is None:
            words, latest = _nothing_changed(n_positions, self.clustered.vocab_size)
        else:
            words = adjustment.words
            latest = held(adjustment.latest)
        mask = _no_mask(self.clustered.vocab_size)
        if allowed is not None:
            mask = held(allowed).reshape(-1, allowed.shape[-1])
        results = (logits.shape, logits.dtype), ((n_positions, n_held), mx.float32)
        logits, best = self._adjust(
            [probes, ids, logits, words, latest, mask],
            -(-n_held // WIDE_THREADS),
            n_positions,
            *results,
            T=logits.dtype,
        )
        return Candidates(logits, best)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Expands scores (R, C) float32 to full logits (R, V) of the candidates' dtype."""
        if selection.words is None:
            return super().expand(scores, selection, candidates)
        logits = candidates.logits
        vocab_size = self.clustered.vocab_size
        arrays = [selection.words, self.clustered.slot_of, logits, candidates.best]
        groups = -(-vocab_size // (WIDE_THREADS * EXPAND_TOKENS)), len(logits)
        return self._expand(arrays, *groups, ((len(logits), vocab_size), logits.dtype))[0]

    def choose(
        self,
        selection: Selection,
        candidates: Candidates,
        draws: Draws | None,
        risk: Risk = USUAL,
        logit_map: LogitMap = IDENTITY,
        masked: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Chooses a token of each row, (R,) uint32, with its risk, (R,) float32."""
        if draws is not None and draws.any_by_number:
            return super().choose(selection, candidates, draws, risk, logit_map, masked)
        logits = candidates.logits
        n_positions = len(candidates.logits)
        settings = _draw_arrays(draws, n_positions)
        arrays = [selection.probes, self.clustered.token_ids, logits, candidates.best]
        arrays += [
            _with_unscored(selection),
            *settings,
            mx.array([*risk, 0.0 if masked else 1.0]),
        ]
        results = ((n_positions,), mx.uint32), ((n_positions,), mx.float32)
        template = logit_map.template(logits.dtype)
        tokens, chances = self._sample(arrays, 1, n_positions, *results, T=logits.dtype, **template)
        return tokens, chances

    def join(self, proposals: Sequence[Proposal], rows: Rows) -> tuple[mx.array, ...]:
        """Joins the states, probes and logits of some rows of the proposals."""
        if len(proposals) > JOINED or proposals[0].probes.shape[-1] < MIN_PROBES:
            return super().join(proposals, rows)
        sources = [*proposals, *[proposals[0]] * (JOINED - len(proposals))]
        arrays = [array for p in sources for array in (p.hidden, p.probes, p.logits)]
        results = [((len(rows), *array.shape[1:]), array.dtype) for array in arrays[:3]]
        filled = [*rows, *[rows[-1]] * (HELD - len(rows))]
        arrays.append(mx.array(filled, mx.uint32))
        return tuple(self._join(arrays, JOINED, len(rows), *results))

    def tolerances(
        self, hidden: mx.array, longest: float, product: float, scored: float
    ) -> tuple[mx.array, mx.array]:
        """Computes how far logits of states (k, D) may be off: two arrays (k,) float32."""
        shares = mx.array([product, scored, longest], mx.float32)
        result = (len(hidden),), mx.float32
        of_product, of_scored = self._tolerance([hidden, shares], 1, len(hidden), result, result)
        return of_product, of_scored

    def screen(
        self,
        slots: mx.array,
        proposal: Proposal,
        draws: Draws | None,
        tolerance: Tolerance,
        epsilon: float,
        logit_map: LogitMap = IDENTITY,
        allowed: mx.array | None = None,
    ) -> Screen:
        """Finds which proposals of k states are the dense choice for sure.

        It takes the logits (k, C, n) of all slots.
        """
        if draws is not None and draws.any_by_number:
            return super().screen(slots, proposal, draws, tolerance, epsilon, logit_map, allowed)
        inputs = self._screen_inputs(proposal, draws, tolerance)
        parts = self._tallies(slots, inputs, logit_map, allowed)
        n_states = len(slots)
        sure, known = self._certain(
            [
                *(parts, inputs.probes, self.clustered.token_ids, inputs.logits, inputs.tokens),
                *(inputs.settings, inputs.top_k, inputs.keys, *inputs.tolerances),
                mx.array(epsilon, mx.float32),
            ],
            1,
            n_states,
            ((n_states,), mx.bool_),
            ((n_states, 3), mx.float32),
            T=inputs.logits.dtype,
            **logit_map.template(slots.dtype),
        )
        return Screen(sure, *(known[:, i] for i in range(3)))

    def tallies(
        self,
        slots: mx.array,
        proposal: Proposal,
        draws: Draws | None,
        tolerance: Tolerance,
        logit_map: LogitMap = IDENTITY,
        allowed: mx.array | None = None,
    ) -> mx.array:
        """Runs the first kernel of :meth:`screen`.

        Returns:
            (k, parts, TALLIED) float32: of each part of the clusters the largest logit, the best
            that was not scored, and so on.
        """
        inputs = self._screen_inputs(proposal, draws, tolerance)
        return self._tallies(slots, inputs, logit_map, allowed)

    def _screen_inputs(
        self, proposal: Proposal, draws: Draws | None, tolerance: Tolerance
    ) -> "_ScreenInputs":
        proposal = _with_held_probes(proposal)
        relative = mx.array(tolerance.relative, mx.float32)
        settings, top_k, keys = _draw_arrays(draws, len(proposal.probes))
        return _ScreenInputs(
            proposal.probes,
            proposal.logits,
            held(proposal.tokens),
            settings,
            top_k,
            keys,
            (held(tolerance.product), held(tolerance.scored), relative),
        )

    def _tallies(
        self,
        slots: mx.array,
        inputs: "_ScreenInputs",
        logit_map: LogitMap,
        allowed: mx.array | None,
    ) -> mx.array:
        n_states = len(slots)
        n_parts = -(-self.clustered.n_clusters // SCREEN_CLUSTERS)
        ids = self.clustered.token_ids
        slot_of = self.clustered.slot_of
        return self._screen(
            [
                *(slots, inputs.probes, ids, slot_of, inputs.logits, inputs.tokens),
                *(inputs.settings, inputs.keys, *inputs.tolerances),
                slot_of if allowed is None else held(allowed),  # any array, which is not read
            ],
            n_parts,
            n_states,
            ((n_states, n_parts, TALLIED), mx.float32),
            MASKED=allowed is not None,
            **logit_map.template(slots.dtype),
        )[0]


class _ScreenInputs(NamedTuple):
    """What both kernels of a screen read, none of it short."""

    probes: mx.array
    logits: mx.array
    tokens: mx.array
    settings: mx.array
    top_k: mx.array
    keys: mx.array
    tolerances: tuple[mx.array, mx.array, mx.array]  # of the product, of scored logits, relative


def _with_unscored(selection: Selection) -> mx.array:
    """What was not scored, (R, UNSCORED): of MLX's operations filled up."""
    unscored = cast(mx.array, selection.unscored)
    missing = UNSCORED - unscored.shape[1]
    return mx.pad(unscored, [(0, 0), (0, missing)]) if missing else unscored


def _with_held_probes(proposal: Proposal) -> Proposal:
    """The proposal with MIN_PROBES or more: the last one is repeated, as `select` does it."""
    missing = MIN_PROBES - proposal.probes.shape[1]
    if missing <= 0:
        return proposal
    logits = proposal.logits
    n_rows, _, size = logits.shape
    nothing = mx.full((n_rows, missing, size), mx.finfo(logits.dtype).min, logits.dtype)
    last = mx.repeat(proposal.probes[:, -1:], missing, axis=1)
    return proposal._replace(
        probes=mx.concatenate([proposal.probes, last], axis=1),
        logits=mx.concatenate([logits, nothing], axis=1),
    )


def _draw_arrays(draws: Draws | None, n_positions: int) -> list[mx.array]:
    """Settings, top_k and keys for a kernel; without draws of greedy rows."""
    if draws is None:
        return _greedy_draws(n_positions)
    return list(draws.held)


@cache
def _greedy_draws(n_positions: int) -> list[mx.array]:
    """Settings, top_k and keys of greedy rows, at least 8: one kernel serves any number."""
    n_rows = max(n_positions, MIN_PROBES)
    counts = mx.array([[0] * 2] * n_rows, mx.uint32)
    return [mx.array([[0.0] * 3] * n_rows), counts, counts]


# What a text without biases or without a mask gives a kernel: arrays that exist, so that no token
# fills them, and none of fewer than 8 elements.


@cache
def _nothing_changed(n_positions: int, vocab_size: int) -> tuple[mx.array, mx.array]:
    """The words of an adjustment that changes nothing, and the latest tokens that it has not."""
    n_rows = max(n_positions, HELD)
    words = np.zeros((n_rows, ADJUST_HEAD), np.uint32)
    return mx.array(words), mx.array(np.full(n_rows, vocab_size, np.uint32))


@cache
def _no_mask(vocab_size: int) -> mx.array:
    """A mask (1, …) of another length than one that rules tokens out."""
    return mx.array(np.zeros((1, -(-vocab_size // 32) + HELD), np.uint32))
