"""The steps of a FlashHead as Metal kernels, one dispatch each.

``metal/flash_head.metal`` holds the kernels, their plans and shapes. This file knows the arrays and
the threads of each. `portable.py` computes the same with plain MLX operations.
"""

import re
from functools import cache
from pathlib import Path

import mlx.core as mx

from .clustered import ClusteredRows
from .matrix import Matrix
from .steps import Candidates, Selection, Steps

# The constants of the same names in flash_head.metal.
LANES = 32
ROWS = 4
ROUTE_SIMDGROUPS = 2
SELECT_THREADS = 512
WIDE_THREADS = 256
EXPAND_TOKENS = 4

MAX_THREADS = 1024  # of a threadgroup

ROUTE_SOURCE = """
flash_head::route<D, C, H>(
    {rows}, hidden, route_bias, scores, hidden_shape[0], threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
SELECT_SOURCE = """
threadgroup atomic<uint> histogram[flash_head::COPIES * flash_head::COPY_STRIDE];
threadgroup uint totals[2 * flash_head::SELECT_SIMDGROUPS];
threadgroup uint chosen[2];
flash_head::select_probes<C, P>(
    scores, probes, ranks, histogram, totals, chosen, threadgroup_position_in_grid.y,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
SCORE_SOURCE = """
threadgroup float shared[flash_head::LANES];
flash_head::score<D, N, P, V, PADDED>(
    {rows}, hidden, probes, token_ids, {bias}, logits, best, shared, threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
EXPAND_SOURCE = """
threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
flash_head::expand<V, C, N, P>(
    scores, tail_offset, slot_of, ranks, logits, best, expanded, shared,
    threadgroup_position_in_grid, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
"""
TOKEN_SOURCE = """
threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
threadgroup uint lowest[flash_head::WIDE_SIMDGROUPS];
flash_head::greedy_token<N, P>(
    probes, token_ids, logits, best, tokens, shared, lowest, threadgroup_position_in_grid.y,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
IDS_SOURCE = """
flash_head::candidate_ids<N, P>(probes, token_ids, ids, thread_position_in_grid);
"""


@cache
def kernel_source() -> str:
    """The text of flash_head.metal: from the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package, package.parent):
        path = folder / "metal" / "flash_head.metal"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(
        "The kernels' file metal/flash_head.metal is missing from this installation: "
        "install mlx-flashhead again."
    )


@cache
def _header() -> str:
    """The functions of the file, without comments and indentation.

    Short, since MLX copies and hashes this text at every call of a kernel (docs/speed.md).
    """
    text = re.sub(r"#ifndef FLASH_HEAD_JIT\n.*?\n#endif", "", kernel_source(), flags=re.DOTALL)
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def supports(clustered: ClusteredRows) -> str | None:
    """A sentence that says why the kernels do not read these rows; None if they do."""
    for what, stored in (("rows", clustered.rows), ("centroids", clustered.centroids.matrix)):
        reason = _unsupported_format(stored)
        if reason is not None:
            return f"The Metal kernels do not read {what} {reason}."
    if _score_threads(clustered.cluster_size) > MAX_THREADS:
        limit = MAX_THREADS // LANES * ROWS
        return (
            f"The Metal kernels take clusters of at most {limit} tokens, "
            f"and these have {clustered.cluster_size}."
        )
    return None


def _unsupported_format(stored: Matrix) -> str | None:
    if stored.format.metal is None:
        return f"quantized as {stored.format}"
    if not stored.quantized and stored.hidden_size % 4:
        return f"of {stored.hidden_size} unquantized columns, which 4 does not divide"
    return None


def _score_threads(cluster_size: int) -> int:
    return LANES * -(-cluster_size // ROWS)


class _StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them."""

    def __init__(self, stored: Matrix):
        self.names = list(stored.format.arrays)
        self.arrays = [stored.arrays()[name] for name in self.names]
        sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        maker = stored.format.metal
        if maker is None:
            raise ValueError(f"The Metal kernels do not read {stored.format}.")
        self.template = [(name, size) for name, size in sizes.items() if name in maker]
        self.expression = f"flash_head::{maker}({', '.join(self.names)})"


def _kernel(name: str, inputs: list[str], outputs: list[str], source: str):
    return mx.fast.metal_kernel(
        name=f"flash_head_{name}",
        input_names=inputs,
        output_names=outputs,
        header=_header(),
        source=source,
    )


class MetalSteps(Steps):
    """Route, select, score, expand and token, each one Metal kernel. Nothing is evaluated.

    Args:
        clustered: The rows and the index.

    Raises:
        ValueError: If the kernels do not read rows of this format; see ``supports``.
    """

    name = "metal"

    def __init__(self, clustered: ClusteredRows):
        super().__init__(clustered)
        reason = supports(clustered)
        if reason is not None:
            raise ValueError(f"{reason} Use backend='mlx' for this head.")
        self._rows = _StoredRows(clustered.rows)
        self._centroids = _StoredRows(clustered.centroids.matrix)
        self._tail_offset = clustered.centroids.tail_offset.astype(mx.float32)
        self._head_bias = [] if clustered.rows.bias is None else [clustered.rows.bias]
        self._route = _kernel(
            "route",
            ["hidden", *self._centroids.names, "route_bias"],
            ["scores"],
            ROUTE_SOURCE.format(rows=self._centroids.expression),
        )
        self._select = _kernel("select", ["scores"], ["probes", "ranks"], SELECT_SOURCE)
        has_bias = bool(self._head_bias)
        self._score = _kernel(
            "score",
            ["hidden", "probes", "token_ids", *self._rows.names, *["bias"] * has_bias],
            ["logits", "best"],
            SCORE_SOURCE.format(
                rows=self._rows.expression, bias="bias" if has_bias else "flash_head::NoBias{}"
            ),
        )
        self._expand = _kernel(
            "expand",
            ["scores", "tail_offset", "slot_of", "ranks", "logits", "best"],
            ["expanded"],
            EXPAND_SOURCE,
        )
        self._token = _kernel(
            "token", ["probes", "token_ids", "logits", "best"], ["tokens"], TOKEN_SOURCE
        )
        self._ids = _kernel("ids", ["probes", "token_ids"], ["ids"], IDS_SOURCE)

    def route(self, hidden: mx.array) -> mx.array:
        """Scores of all clusters: hidden (R, D) → (R, C) float32."""
        n_rows = hidden.shape[0]
        n_clusters = self.clustered.n_clusters
        shared = n_rows if n_rows <= 2 else 4  # positions that share one reading of the centroids
        threads = LANES * ROUTE_SIMDGROUPS
        (scores,) = self._route(
            inputs=[hidden, *self._centroids.arrays, self.clustered.route_bias],
            template=[
                ("D", self.clustered.hidden_size),
                ("C", n_clusters),
                ("H", shared),
                *self._centroids.template,
            ],
            grid=(threads * -(-n_clusters // (ROWS * ROUTE_SIMDGROUPS)), -(-n_rows // shared), 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(n_rows, n_clusters)],
            output_dtypes=[mx.float32],
        )
        return scores

    def select(self, scores: mx.array, n_probes: int) -> Selection:
        """The ``n_probes`` best clusters of each row, ascending: (R, C) → (R, p) and (R, C)."""
        n_rows, n_clusters = scores.shape
        probes, ranks = self._select(
            inputs=[scores],
            template=[("C", n_clusters), ("P", n_probes)],
            grid=(SELECT_THREADS, n_rows, 1),
            threadgroup=(SELECT_THREADS, 1, 1),
            output_shapes=[(n_rows, n_probes), (n_rows, n_clusters)],
            output_dtypes=[mx.uint32, mx.uint32],
        )
        return Selection(probes, ranks)

    def score(self, hidden: mx.array, selection: Selection) -> Candidates:
        """Logits of the probed clusters' rows: hidden (R, D) → (R, p, n), and (R, p) bests."""
        n_rows, n_probes = selection.probes.shape
        clustered = self.clustered
        threads = _score_threads(clustered.cluster_size)
        logits, best = self._score(
            inputs=[
                hidden,
                selection.probes,
                clustered.token_ids,
                *self._rows.arrays,
                *self._head_bias,
            ],
            template=[
                ("D", clustered.hidden_size),
                ("N", clustered.cluster_size),
                ("P", n_probes),
                ("V", clustered.vocab_size),
                ("PADDED", clustered.padded),
                *self._rows.template,
            ],
            grid=(threads * n_probes, n_rows, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(n_rows, n_probes, clustered.cluster_size), (n_rows, n_probes)],
            output_dtypes=[clustered.rows.logits_dtype(hidden.dtype), mx.float32],
        )
        return Candidates(logits, best)

    def expand(self, scores: mx.array, selection: Selection, candidates: Candidates) -> mx.array:
        """Full logits, (R, V) in the candidates' dtype; see ``PortableSteps.expand``."""
        n_rows, n_probes, cluster_size = candidates.logits.shape
        vocab_size = self.clustered.vocab_size
        (expanded,) = self._expand(
            inputs=[
                scores,
                self._tail_offset,
                self.clustered.slot_of,
                selection.ranks,
                candidates.logits,
                candidates.best,
            ],
            template=[
                ("V", vocab_size),
                ("C", scores.shape[1]),
                ("N", cluster_size),
                ("P", n_probes),
            ],
            grid=(WIDE_THREADS * -(-vocab_size // (WIDE_THREADS * EXPAND_TOKENS)), n_rows, 1),
            threadgroup=(WIDE_THREADS, 1, 1),
            output_shapes=[(n_rows, vocab_size)],
            output_dtypes=[candidates.logits.dtype],
        )
        return expanded

    def token(self, selection: Selection, candidates: Candidates) -> mx.array:
        """The greedy token: (R,) uint32; the lowest id among equals, as argmax over V does."""
        n_rows, n_probes, cluster_size = candidates.logits.shape
        (tokens,) = self._token(
            inputs=[
                selection.probes,
                self.clustered.token_ids,
                candidates.logits,
                candidates.best,
            ],
            template=[("N", cluster_size), ("P", n_probes)],
            grid=(WIDE_THREADS, n_rows, 1),
            threadgroup=(WIDE_THREADS, 1, 1),
            output_shapes=[(n_rows,)],
            output_dtypes=[mx.uint32],
        )
        return tokens

    def token_ids(self, probes: mx.array) -> mx.array:
        """Token ids of the probed clusters: (R, p) → (R, p, n) uint32, V for a padded slot."""
        n_rows, n_probes = probes.shape
        cluster_size = self.clustered.cluster_size
        (ids,) = self._ids(
            inputs=[probes, self.clustered.token_ids],
            template=[("N", cluster_size), ("P", n_probes)],
            grid=(WIDE_THREADS * -(-n_probes * cluster_size // WIDE_THREADS), n_rows, 1),
            threadgroup=(WIDE_THREADS, 1, 1),
            output_shapes=[(n_rows, n_probes, cluster_size)],
            output_dtypes=[mx.uint32],
        )
        return ids
