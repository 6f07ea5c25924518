"""The steps of a FlashHead as Metal kernels, one dispatch each: their arrays and threads. The files
in ``metal/flash_head/`` hold the kernels, their plans and shapes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import mlx.core as mx

from .clustered import ClusteredRows
from .draw import Draws
from .kernel_text import (
    CERTAIN_BODY,
    EXPAND_BODY,
    JOIN_BODY,
    JOIN_CASE,
    ROUTE_BODY,
    SAMPLE_BODY,
    SCORE_BODY,
    SCREEN_BODY,
    SELECT_BODY,
    header,
)
from .matrix import Matrix
from .portable import PortableSteps
from .steps import DEFAULT_RISK, NO_DEPTH, Candidates, Proposal, Risk, Screen, Selection

# The constants of the same names in metal/flash_head/constants.h.
LANES = 32
ROWS = 4
ROUTE_SIMDGROUPS = 2
SCORE_SIMDGROUPS = 8
ROW_THREADS = 512
WIDE_THREADS = 256
EXPAND_TOKENS = 4
SCREEN_CLUSTERS = 1024
TALLIED = 8
MIN_PROBES = 8

JOINED = 8  # sources of a join: Metal has 31 buffers
PACKS = {5: 8, 6: 4}  # values of a pack, where it is not a word
SHARED_POSITIONS = 4  # that share one reading of the centroids
# Positions from which MLX's own product routes: its matrix kernels begin at 6 to 13 positions, by
# the GPU, for more than 4,096 rows. Source: get_qmv_batch_limit in mlx/backend/metal/quantized.cpp.
MATRIX_FROM = 12
FLOAT16_FROM = 6  # states: fewer are not multiplied as a matrix on any GPU that lacks bfloat16


def unsupported_formats(clustered: ClusteredRows) -> dict[str, str]:
    """The steps for which no kernel reads the rows, with the format of these rows."""
    formats = {"route": clustered.centroids.matrix.format, "score": clustered.rows.format}
    return {step: str(form) for step, form in formats.items() if form.metal is None}


class _StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them."""

    def __init__(self, stored: Matrix, n_rows: int):
        maker = cast(str, stored.format.metal)
        self.names = " ".join(stored.format.arrays)
        self.arrays = [stored.arrays()[name] for name in stored.format.arrays]
        sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            # Packs that a lane takes at once, words of 32 bits, of 5 and 6 bits 8 and 4 values: as
            # qmv in MLX's quantized.cpp does.
            pack = PACKS.get(stored.bits, 32 // stored.bits)
            two = stored.hidden_size % (2 * LANES * pack) == 0 and n_rows % 8 == 0
            sizes["WORDS"] = 2 if two else 1
        self.template = [(name, size) for name, size in sizes.items() if name in maker]
        self.expression = f"flash_head::{maker}({', '.join(stored.format.arrays)})"
        self.files = (maker.partition("_rows")[0], "dot")


class MetalSteps(PortableSteps):
    """Route, select, score, sample and expand, each one Metal kernel, as ``metal_kernel`` makes
    them. A position holds max(p, 8) probes; beyond p the last one is repeated."""

    name = "metal"

    def __init__(self, clustered: ClusteredRows, metal_kernel: Callable | None = None):
        super().__init__(clustered)
        self._metal_kernel: Callable = metal_kernel or mx.fast.metal_kernel
        self.unsupported_formats = unsupported_formats(
            clustered
        )  # the steps that stay plain operations
        self.float16_rows: Matrix | None = None  # all rows, for `verifying_product`
        self._tail_offset = clustered.centroids.tail_offset.astype(mx.float32)
        n_rows, n_clusters = clustered.vocab_size, clustered.n_clusters
        self._sizes = {"V": n_rows, "C": n_clusters}
        self._sizes |= {"N": clustered.cluster_size, "D": clustered.hidden_size}
        self._route_grid = LANES * ROUTE_SIMDGROUPS * -(-n_clusters // (ROWS * ROUTE_SIMDGROUPS))
        self._expand_grid = WIDE_THREADS * -(-n_rows // (WIDE_THREADS * EXPAND_TOKENS))
        self._score_threads = LANES * min(SCORE_SIMDGROUPS, -(-clustered.cluster_size // ROWS))
        self._select_template, self._sample_template = self._of_sizes("C"), self._of_sizes("NV")
        self._expand_template = self._of_sizes("VCN")
        if "route" not in self.unsupported_formats:
            stored = _StoredRows(clustered.centroids.matrix, n_clusters)
            self._route_arrays = [*stored.arrays, clustered.route_bias]
            body = ROUTE_BODY.format(rows=stored.expression)
            inputs, files = f"hidden {stored.names} route_bias", (*stored.files, "route")
            self._route = self._kernel("route", inputs, "scores", body, *files)
            self._route_templates = {
                shared: [*self._of_sizes("DC"), ("H", shared), *stored.template]
                for shared in (1, SHARED_POSITIONS)
            }
        if "score" not in self.unsupported_formats:
            stored = _StoredRows(clustered.rows, n_rows)
            bias = [] if clustered.rows.bias is None else [clustered.rows.bias]
            self._score_arrays = [clustered.token_ids, *stored.arrays, *bias]
            names = {"rows": stored.expression, "bias": "bias" if bias else "flash_head::NoBias{}"}
            body = SCORE_BODY.format(**names)
            inputs = f"hidden probes token_ids {stored.names}" + " bias" * len(bias)
            self._score = self._kernel("score", inputs, "logits best", body, *stored.files, "score")
            padded = ("PADDED", clustered.padded)
            self._score_template = [*self._of_sizes("DNV"), padded, *stored.template]
        inputs, outputs = "scores n_probes depth", "probes unscored"
        of_select = ("histogram", "select")
        body = SELECT_BODY.format(words="NoWords{}")
        self._select = self._kernel("select", inputs, outputs, body, *of_select)
        inputs, outputs = "scores tail_offset n_probes depth", "probes unscored words"
        body = SELECT_BODY.format(words="cluster_words(words, tail_offset)")
        self._select_words = self._kernel("select_words", inputs, outputs, body, *of_select)
        inputs = "probes token_ids logits best unscored settings top_k keys fit"
        outputs = "tokens risk"
        self._sample = self._kernel(
            "sample", inputs, outputs, SAMPLE_BODY, "histogram", "noise", "sample"
        )
        inputs = "slots probes token_ids slot_of logits tokens settings keys room scored_room"
        of_screen = ("noise", "screen")
        self._screen = self._kernel("screen", inputs, "parts", SCREEN_BODY, *of_screen)
        inputs = "parts probes token_ids logits tokens settings top_k keys room scored_room epsilon"
        self._certain = self._kernel("certain", inputs, "sure known", CERTAIN_BODY, *of_screen)
        sources = [f"hidden_{i} probes_{i} logits_{i}" for i in range(JOINED)]
        cases = "\n".join(JOIN_CASE.format(i=i) for i in range(JOINED))
        inputs, body = " ".join([*sources, "rows"]), JOIN_BODY.format(cases=cases)
        self._join = self._kernel("join", inputs, "hidden probes logits", body, "join")
        inputs = "words slot_of logits best"
        self._expand = self._kernel("expand", inputs, "expanded", EXPAND_BODY, "expand")

    def _of_sizes(self, names: str) -> list[tuple[str, Any]]:
        return [(name, self._sizes[name]) for name in names]

    def _kernel(self, name: str, inputs: str, outputs: str, body: str, *files: str) -> Callable:
        return self._metal_kernel(
            name=f"flash_head_{name}",
            input_names=inputs.split(),
            output_names=outputs.split(),
            header=header(*files),
            source=body,
        )

    def verifying_product(self, hidden: mx.array) -> mx.array:
        """In float16 where these rows are the same in it and a GPU lacks bfloat16."""
        if self.float16_rows is None or hidden.dtype != mx.bfloat16 or len(hidden) < FLOAT16_FROM:
            return self.product(hidden)
        logits = self.float16_rows.matmul(hidden.astype(mx.float16))
        return logits.astype(self.clustered.rows.logits_dtype(hidden.dtype))

    def route(self, hidden: mx.array) -> mx.array:
        """Scores of all clusters: hidden (R, D) → (R, C) float32."""
        n_positions = hidden.shape[0]
        if "route" in self.unsupported_formats or n_positions >= MATRIX_FROM:
            return super().route(hidden)
        shared = 1 if n_positions == 1 else SHARED_POSITIONS
        (scores,) = self._route(
            inputs=[hidden, *self._route_arrays],
            template=self._route_templates[shared],
            grid=(self._route_grid, -(-n_positions // shared), 1),
            threadgroup=(LANES * ROUTE_SIMDGROUPS, 1, 1),
            output_shapes=[(n_positions, self._sizes["C"])],
            output_dtypes=[mx.float32],
        )
        return scores

    def select(
        self, scores: mx.array, n_probes: int, words: bool = True, depth: float = NO_DEPTH
    ) -> Selection:
        """The ``n_probes`` best clusters of each row, ascending, and the tail. Of clusters that
        differ by less than 1/64 nat those of lower ids count as better."""
        n_positions, n_clusters = scores.shape
        if "score" in self.unsupported_formats:
            depth = NO_DEPTH  # MLX's operations would read the repeated probes
        kernel = self._select_words if words else self._select
        tail_offset = [self._tail_offset] * words
        limits = [mx.array(n_probes, dtype=mx.uint32), mx.array(depth, dtype=mx.float32)]
        results = kernel(
            inputs=[scores, *tail_offset, *limits],
            template=self._select_template,
            grid=(ROW_THREADS, n_positions, 1),
            threadgroup=(ROW_THREADS, 1, 1),
            output_shapes=[
                (n_positions, max(n_probes, MIN_PROBES)),
                (n_positions, 2),
                *[(n_positions, n_clusters)] * words,
            ],
            output_dtypes=[mx.uint32, mx.float32, *[mx.uint32] * words],
        )
        return Selection(results[0], results[2] if words else None, unscored=results[1])

    def score(self, hidden: mx.array, selection: Selection) -> Candidates:
        """Logits of the probed clusters' rows: hidden (R, D) → (R, S, n), and (R, S) bests."""
        if "score" in self.unsupported_formats:
            logits = super().score(hidden, selection).logits
            return Candidates(logits, mx.max(logits, axis=-1).astype(mx.float32))
        probes = selection.probes
        n_positions, held = probes.shape
        rows = self.clustered.rows
        product = ("PRODUCT", rows.product_dtype(hidden.dtype))
        logits, best = self._score(
            inputs=[hidden, probes, *self._score_arrays],
            template=[*self._score_template, product],
            grid=(self._score_threads * held, n_positions, 1),
            threadgroup=(self._score_threads, 1, 1),
            output_shapes=[(n_positions, held, self._sizes["N"]), (n_positions, held)],
            output_dtypes=[rows.logits_dtype(hidden.dtype), mx.float32],
        )
        return Candidates(logits, best)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Full logits, (R, V) in the candidates' dtype; see ``PortableSteps.expand``."""
        if selection.words is None:
            return super().expand(scores, selection, candidates)
        logits = candidates.logits
        n_positions = len(logits)
        (expanded,) = self._expand(
            inputs=[selection.words, self.clustered.slot_of, logits, candidates.best],
            template=self._expand_template,
            grid=(self._expand_grid, n_positions, 1),
            threadgroup=(WIDE_THREADS, 1, 1),
            output_shapes=[(n_positions, self._sizes["V"])],
            output_dtypes=[logits.dtype],
        )
        return expanded

    def token(self, selection: Selection, candidates: Candidates) -> mx.array:
        """The greedy token: (R,) uint32; the lowest id among equals, as argmax over V does."""
        unscored, *_ = _greedy_draws(len(candidates.logits))  # any values, for the risk alone
        return self.choose(selection, candidates, unscored, None)[0]

    def choose(
        self,
        selection: Selection,
        candidates: Candidates,
        unscored: mx.array,
        draws: Draws | None,
        risk: Risk = DEFAULT_RISK,
    ) -> tuple[mx.array, mx.array]:
        """Tokens and risk in one kernel; see ``PortableSteps.choose``."""
        logits = candidates.logits
        n_positions = len(logits)
        settings = _greedy_draws(n_positions) if draws is None else draws[:3]
        scored = [selection.probes, self.clustered.token_ids, logits, candidates.best]
        tokens, chances = self._sample(
            inputs=[*scored, unscored, *settings, mx.array(risk)],
            template=[*self._sample_template, ("T", logits.dtype)],
            grid=(ROW_THREADS, n_positions, 1),
            threadgroup=(ROW_THREADS, 1, 1),
            output_shapes=[(n_positions,), (n_positions,)],
            output_dtypes=[mx.uint32, mx.float32],
        )
        return tokens, chances

    def join(
        self, proposals: Sequence[Proposal], rows: Sequence[tuple[int, int]]
    ) -> tuple[mx.array, mx.array, mx.array]:
        """One dispatch for up to 8 proposals; see ``PortableSteps.join``."""
        form = proposals[0]
        if form.probes.shape[-1] < MIN_PROBES:  # MLX passes small arrays in another address space
            return super().join(proposals, rows)
        if len(proposals) > JOINED:
            first = [row for row in rows if row[0] < JOINED]
            hidden, probes, logits = self.join(proposals[:JOINED], first)
            form = form._replace(hidden=hidden, probes=probes, logits=logits)
            place = iter(range(len(first)))
            rest = [(0, next(place)) if i < JOINED else (i - JOINED + 1, row) for i, row in rows]
            return self.join([form, *proposals[JOINED:]], rest)
        sources = [*proposals, *[form] * (JOINED - len(proposals))]
        arrays = [array for p in sources for array in (p.hidden, p.probes, p.logits)]
        shapes = [(len(rows), *array.shape[1:]) for array in arrays[:3]]
        hidden, probes, logits = self._join(
            inputs=[*arrays, mx.array(list(rows), mx.uint32)],
            template=self._of_sizes("DN"),
            grid=(WIDE_THREADS * JOINED, len(rows), 1),
            threadgroup=(WIDE_THREADS, 1, 1),
            output_shapes=shapes,
            output_dtypes=[array.dtype for array in arrays[:3]],
        )
        return hidden, probes, logits

    def screen(
        self,
        slots: mx.array,
        proposal: Proposal,
        draws: Draws | None,
        room: mx.array,
        scored_room: mx.array,
        epsilon: float,
    ) -> Screen:
        """Two dispatches; see ``PortableSteps.screen``."""
        k, n_parts = len(slots), -(-self._sizes["C"] // SCREEN_CLUSTERS)
        settings, top_k, keys = _greedy_draws(k) if draws is None else draws[:3]
        rooms = room, scored_room
        ids, chosen = self.clustered.token_ids, (proposal.logits, proposal.tokens, settings)
        (parts,) = self._screen(
            inputs=[slots, proposal.probes, ids, self.clustered.slot_of, *chosen, keys, *rooms],
            template=[*self._of_sizes("CNV"), ("PADDED", self.clustered.padded)],
            grid=(WIDE_THREADS * n_parts, k, 1),
            threadgroup=(WIDE_THREADS, 1, 1),
            output_shapes=[(k, n_parts, TALLIED)],
            output_dtypes=[mx.float32],
        )
        last = (top_k, keys, *rooms, mx.array(epsilon, mx.float32))
        sure, known = self._certain(
            inputs=[parts, proposal.probes, ids, *chosen, *last],
            template=self._of_sizes("NV"),
            grid=(ROW_THREADS, k, 1),
            threadgroup=(ROW_THREADS, 1, 1),
            output_shapes=[(k,), (k, 3)],
            output_dtypes=[mx.bool_, mx.float32],
        )
        return Screen(sure, *(known[:, i] for i in range(3)))


@cache
def _greedy_draws(n_positions: int) -> list[mx.array]:
    """Settings, top_k and keys of greedy rows, at least 8: one kernel serves any number."""
    n_rows = max(n_positions, MIN_PROBES)
    counts = mx.array([[0] * 2] * n_rows, mx.uint32)
    return [mx.array([[0.0] * 3] * n_rows), counts, counts]
