"""The Metal kernels: their texts, a call each of a function in ``metal/flash_head/``, and launches.

``metal_steps.py`` launches those of a head.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from .clustered import ClusteredRows
from .dense_kernels import Version, dense_kernel
from .matrix import Matrix

Launch = Callable[..., list[mx.array]]

# The constants of the same names in metal/flash_head/constants.h.
LANES = 32
ROWS = 4
ROUTE_SIMDGROUPS = 2
SCORE_SIMDGROUPS = 8
WIDE_THREADS = 256
EXPAND_TOKENS = 4
SCREEN_CLUSTERS = 1024
TALLIED = 10

JOINED = 8  # sources of a join: Metal has 31 buffers

# Threads of a threadgroup in kernels with one threadgroup a position; fewer where a pipeline allows
# no more.
ROW_THREADS = 512
FEWER_THREADS = 256

# A map of logits, whose template arguments LogitMap.template gives.
LOGIT_MAP = "flash_head::LogitMap<MAPPED, MULTIPLIER, DIVISOR, CAP>"


class KernelText(NamedTuple):
    """A kernel as MLX takes it, but for what all launches have in common."""

    inputs: str  # their names
    outputs: str
    body: str
    files: str  # of metal/flash_head/ that the body needs, beside those that all kernels need
    sizes: str  # template arguments that are the same for all launches
    threads: int | None = None  # of a threadgroup; None: ROW_THREADS or FEWER_THREADS


ROUTE_BODY = """
flash_head::route<D, C, H>(
    {rows}, hidden, route_bias, scores, hidden_shape[0], threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
SELECT_BODY = f"""
{{marks}}threadgroup atomic<uint> histogram[flash_head::SELECT_BINS];
threadgroup uint shared[flash_head::SELECT_SHARED];
threadgroup float sums[flash_head::ROW_SUMS];
flash_head::select_probes<C, N, {LOGIT_MAP}>(
    scores, flash_head::{{words}}, flash_head::{{forced}}, n_probes, depth, probes, unscored,
    histogram, shared, sums, threadgroup_position_in_grid.y, thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
# The clusters that an adjustment needs, for SELECT_BODY.
MARKS = "threadgroup atomic<uint> marks[(C + 31) / 32];\n"
FORCED = """mark_clusters<C, N>(
    adjustment, latest, slot_of, marks, adjustment_shape[1], V, threadgroup_position_in_grid.y,
    thread_index_in_threadgroup)"""
SCORE_BODY = f"""
threadgroup uint shared[flash_head::SCORE_SIMDGROUPS];
flash_head::score<D, N, V, PADDED, PRODUCT, RAW, {LOGIT_MAP}>(
    {{rows}}, hidden, probes, token_ids, {{bias}}, logits, best, shared, threadgroups_per_grid.x,
    threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
JOIN_BODY = """
const uint row = threadgroup_position_in_grid.y;
const uint from = rows[2 * row + 1];
const uint first = thread_position_in_grid.x;
const uint step = threads_per_grid.x;
const uint held = logits_0_shape[1];
switch (rows[2 * row]) {{
{cases}
}}
"""
JOIN_CASE = """  case {i}:
    flash_head::copy_row(hidden_{i}, from, hidden, row, D, first, step);
    flash_head::copy_row(probes_{i}, from, probes, row, held, first, step);
    flash_head::copy_row(logits_{i}, from, logits, row, held * N, first, step);
    break;"""

# All kernels but those that read rows: they depend on how these are stored.
KERNELS = {
    "select": KernelText(
        "scores n_probes depth",
        "probes unscored",
        SELECT_BODY.format(marks="", words="NoWords{}", forced="NotForced{}"),
        files="histogram select",
        sizes="C N",
    ),
    "select_forced": KernelText(
        "scores adjustment latest slot_of n_probes depth",
        "probes unscored",
        SELECT_BODY.format(marks=MARKS, words="NoWords{}", forced=FORCED),
        files="histogram select",
        sizes="C N V",
    ),
    "select_words": KernelText(
        "scores tail_offset n_probes depth",
        "probes unscored words",
        SELECT_BODY.format(
            marks="", words="cluster_words(words, tail_offset)", forced="NotForced{}"
        ),
        files="histogram select",
        sizes="C N",
    ),
    "expand": KernelText(
        "words slot_of logits best",
        "expanded",
        """
threadgroup uint shared[flash_head::WIDE_SIMDGROUPS];
flash_head::expand<V, C, N>(
    words, slot_of, logits, best, expanded, shared, best_shape[1], threadgroup_position_in_grid,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        files="expand",
        sizes="V C N",
        threads=WIDE_THREADS,
    ),
    "sample": KernelText(
        "probes token_ids logits best unscored settings top_k keys fit",
        "tokens risk",
        f"""
threadgroup atomic<uint> histogram[2 * flash_head::SAMPLE_BINS];
threadgroup uint shared[flash_head::SAMPLE_SHARED];
threadgroup float sums[flash_head::ROW_SUMS];
flash_head::sample<N, V, {LOGIT_MAP}, T>(
    probes, token_ids, logits, best, unscored, settings, top_k, keys, fit, tokens, risk, histogram,
    shared, sums, best_shape[1], threadgroup_position_in_grid.y, thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        files="histogram noise sample",
        sizes="N V",
    ),
    "join": KernelText(
        " ".join(f"hidden_{i} probes_{i} logits_{i}" for i in range(JOINED)) + " rows",
        "hidden probes logits",
        JOIN_BODY.format(cases="\n".join(JOIN_CASE.format(i=i) for i in range(JOINED))),
        files="join",
        sizes="D N",
        threads=WIDE_THREADS,
    ),
    "adjust": KernelText(
        "probes token_ids logits adjustment latest allowed",
        "changed best",
        """
flash_head::adjust<N, V, T>(
    probes, token_ids, logits, adjustment, latest, allowed, changed, best, probes_shape[1],
    adjustment_shape[1], allowed_shape[1], threadgroup_position_in_grid.y,
    thread_position_in_grid.x);
""",
        files="adjust",
        sizes="N V",
        threads=WIDE_THREADS,
    ),
    "screen": KernelText(
        "slots probes token_ids slot_of logits tokens settings keys product_tolerance "
        "scored_tolerance relative allowed",
        "parts",
        f"""
threadgroup atomic<uint> marks[flash_head::SCREEN_CLUSTERS / 32];
threadgroup uint place[1];
threadgroup float shared[flash_head::TALLY * flash_head::WIDE_SIMDGROUPS];
flash_head::screen<C, N, V, PADDED, MASKED, {LOGIT_MAP}>(
    slots, probes, token_ids, slot_of, logits, tokens, settings, keys, product_tolerance,
    scored_tolerance, relative, allowed, parts, marks, place, shared, logits_shape[1],
    threadgroups_per_grid.x, threadgroup_position_in_grid, thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        files="noise tally screen",
        sizes="C N V PADDED",
        threads=WIDE_THREADS,
    ),
    "certain": KernelText(
        "parts probes token_ids logits tokens settings top_k keys product_tolerance "
        "scored_tolerance relative epsilon",
        "sure known",
        f"""
threadgroup float shared[(flash_head::TALLY + 2) * flash_head::ROW_SIMDGROUPS];
flash_head::certain<N, V, {LOGIT_MAP}, T>(
    parts, probes, token_ids, logits, tokens, settings, top_k, keys, product_tolerance,
    scored_tolerance, relative, epsilon, sure, known, shared, logits_shape[1], parts_shape[1],
    threadgroup_position_in_grid.y, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
""",
        files="noise tally certain",
        sizes="N V",
    ),
    "tolerance": KernelText(
        "hidden shares",
        "product scored",
        """
threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
flash_head::tolerance<D>(
    hidden, shares, product, scored, shared, threadgroup_position_in_grid.y,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        files="tolerance",
        sizes="D",
        threads=WIDE_THREADS,
    ),
    "map": KernelText(
        "values",
        "mapped",
        f"""
flash_head::map_values<{LOGIT_MAP}>(values, mapped, values_shape[0], thread_position_in_grid.x);
""",
        files="",
        sizes="",
        threads=WIDE_THREADS,
    ),
}


@cache
def part(name: str) -> str:
    """The text of one file of the kernels: of the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = package if (package / "metal").is_dir() else package.parent
    return (folder / "metal" / "flash_head" / f"{name}.h").read_text(encoding="utf-8")


@cache
def header(*names: str, row_threads: int = ROW_THREADS) -> str:
    """Joins the files that a kernel needs, beginning with those that all kernels need.

    The text has no comments and no indentation: MLX copies and hashes this text at every call of a
    kernel (docs/speed.md).

    Args:
        names: The files, without those that all kernels need.
        row_threads: Threads of a kernel with one threadgroup a position.
    """
    text = "\n".join(map(part, ("constants", "values", "logit_map", *names)))
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    text = "\n".join(line for line in lines if line) + "\n"
    if row_threads != ROW_THREADS:
        text = f"#define FLASH_HEAD_ROW_THREADS {row_threads}\n{text}"
    return text


class StoredRows:
    """Stored rows for a kernel: names of its inputs, the arrays, and the expression over them.

    The arrays end with a bias, if there is one.

    Args:
        stored: The rows.
        n_rows: The number of rows whose product has the same order of sums.
        version: Of the MLX that makes it; None: the installed one.
    """

    def __init__(self, stored: Matrix, n_rows: int, version: Version | None = None):
        maker = cast(str, stored.format.metal)
        names = stored.format.arrays
        self.kernel = dense_kernel(stored, n_rows, version)
        self.inputs = " ".join(names)
        self.arrays = list(stored.arrays().values())
        self.sizes = {"BITS": stored.bits, "GROUP": stored.group_size}
        if stored.quantized:
            # qmv_quad takes more: then only the order of the sums is another one
            self.sizes["WORDS"] = max(1, self.kernel.packs)
        self.names = " ".join(name for name in self.sizes if name in maker)
        self.expression = f"flash_head::{maker}({', '.join(names)})"
        self.files = f"{maker.partition('_rows')[0]} dot"


def make_kernels(
    clustered: ClusteredRows,
    centroids: StoredRows,
    rows: StoredRows | None,
    metal_kernel: Callable[..., Any],
    row_threads: int,
) -> dict[str, Launch]:
    """Makes the kernels of a head, by name, each a function that launches it.

    Its arguments are the arrays of the inputs, the threadgroups (x, y), and for each output a pair
    of shape and dtype. Keywords are further template arguments.

    Args:
        clustered: The rows.
        centroids: The centroids, for ``route``.
        rows: The rows as they are stored, for ``score``; None if no kernel reads them.
        metal_kernel: Makes a kernel, as ``mx.fast.metal_kernel`` does.
        row_threads: Threads of a threadgroup of the kernels that have one for each position.
    """
    kernels = dict(KERNELS)
    kernels["route"] = KernelText(
        f"hidden {centroids.inputs} route_bias",
        "scores",
        ROUTE_BODY.format(rows=centroids.expression),
        files=f"{centroids.files} route",
        sizes=f"D C {centroids.names}",
        threads=LANES * ROUTE_SIMDGROUPS,
    )
    n_clusters, size = clustered.token_ids.shape
    sizes: dict[str, dict[str, int]] = {"route": centroids.sizes}
    if rows is not None:
        biased = clustered.rows.bias is not None
        kernels["score"] = KernelText(
            f"hidden probes token_ids {rows.inputs}{' bias' if biased else ''}",
            "logits best",
            SCORE_BODY.format(
                rows=rows.expression, bias="bias" if biased else "flash_head::NoBias{}"
            ),
            files=f"{rows.files} score",
            sizes=f"D N V PADDED {rows.names}",
            threads=LANES * min(SCORE_SIMDGROUPS, -(-size // ROWS)),
        )
        sizes["score"] = rows.sizes
    common = {
        "V": clustered.vocab_size,
        "C": n_clusters,
        "N": size,
        "D": clustered.rows.hidden_size,
        "PADDED": clustered.padded,
    }
    return {
        name: make_kernel(name, text, common | sizes.get(name, {}), metal_kernel, row_threads)
        for name, text in kernels.items()
    }


def make_kernel(
    name: str,
    text: KernelText,
    sizes: dict[str, int],
    metal_kernel: Callable[..., Any],
    row_threads: int = ROW_THREADS,
) -> Launch:
    """Makes one kernel, a function as :func:`make_kernels` has them.

    Args:
        name: Its name, without the prefix of all kernels.
        text: Its text.
        sizes: Template arguments, of which it takes those that the text names.
        metal_kernel: Makes it, as ``mx.fast.metal_kernel`` does.
        row_threads: As of :func:`make_kernels`.
    """
    kernel: Launch = metal_kernel(
        name=f"flash_head_{name}",
        input_names=text.inputs.split(),
        output_names=text.outputs.split(),
        header=header(*text.files.split(), row_threads=row_threads),
        source=text.body,
    )
    threads = text.threads or row_threads
    known = [(size, sizes[size]) for size in text.sizes.split()]

    def launch(
        arrays: list[mx.array],
        x: int,
        y: int,
        *results: tuple[tuple[int, ...], mx.Dtype],
        **more: Any,
    ) -> list[mx.array]:
        return kernel(
            inputs=arrays,
            template=[*known, *more.items()],
            grid=(threads * x, y, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[shape for shape, _ in results],
            output_dtypes=[dtype for _, dtype in results],
        )

    return launch
