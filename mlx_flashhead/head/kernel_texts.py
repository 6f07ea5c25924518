"""The kernels: their texts, a call each of a function in ``metal/flash_head/``.

All kernels but those that read rows are in :data:`KERNELS`. The others depend on how the rows are
stored: :func:`route_text` and :func:`score_text` make their texts.
"""

from typing import NamedTuple

from .stored_rows import StoredRows

# The constants of the same names in metal/flash_head/constants.h.
LANES = 32
ROWS = 4
ROUTE_SIMDGROUPS = 2
SCORE_SIMDGROUPS = 8
WIDE_THREADS = 256
EXPAND_TOKENS = 4
SCREEN_CLUSTERS = 1024
TALLIED = 10

# A join has so many sources: Metal has 31 buffers.
JOINED = 8

# Threads of a threadgroup in kernels with one threadgroup a position; fewer where a pipeline allows
# no more.
ROW_THREADS = 512
FEWER_THREADS = 256

# A map of logits, whose template arguments LogitMap.template gives.
LOGIT_MAP = "flash_head::LogitMap<MAPPED, MULTIPLIER, DIVISOR, CAP>"


class KernelText(NamedTuple):
    """A kernel as MLX takes it, but for what all launches have in common.

    Attributes:
        inputs: Names of the inputs, with spaces between them.
        outputs: Names of the outputs.
        body: The call of its function.
        files: Files of metal/flash_head/ that the body needs, beside those that all kernels need.
        sizes: Names of the template arguments that are the same for all launches.
        threads: Threads of a threadgroup; None: ROW_THREADS or FEWER_THREADS.
    """

    inputs: str
    outputs: str
    body: str
    files: str
    sizes: str
    threads: int | None = None


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

SELECT = KernelText(
    "scores n_probes depth",
    "probes unscored",
    SELECT_BODY.format(marks="", words="NoWords{}", forced="NotForced{}"),
    files="histogram select",
    sizes="C N",
)
SELECT_FORCED = KernelText(
    "scores adjustment latest slot_of n_probes depth",
    "probes unscored",
    SELECT_BODY.format(marks=MARKS, words="NoWords{}", forced=FORCED),
    files="histogram select",
    sizes="C N V",
)
SELECT_WORDS = KernelText(
    "scores tail_offset n_probes depth",
    "probes unscored words",
    SELECT_BODY.format(marks="", words="cluster_words(words, tail_offset)", forced="NotForced{}"),
    files="histogram select",
    sizes="C N",
)
EXPAND = KernelText(
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
)
SAMPLE = KernelText(
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
)
JOIN_INPUTS = [f"hidden_{i} probes_{i} logits_{i}" for i in range(JOINED)]
JOIN_CASES = [JOIN_CASE.format(i=i) for i in range(JOINED)]
JOIN = KernelText(
    " ".join([*JOIN_INPUTS, "rows"]),
    "hidden probes logits",
    JOIN_BODY.format(cases="\n".join(JOIN_CASES)),
    files="join",
    sizes="D N",
    threads=WIDE_THREADS,
)
ADJUST = KernelText(
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
)
SCREEN = KernelText(
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
)
CERTAIN = KernelText(
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
)
TOLERANCE = KernelText(
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
)
MAP = KernelText(
    "values",
    "mapped",
    f"""
flash_head::map_values<{LOGIT_MAP}>(values, mapped, values_shape[0], thread_position_in_grid.x);
""",
    files="",
    sizes="",
    threads=WIDE_THREADS,
)
KERNELS = {
    "select": SELECT,
    "select_forced": SELECT_FORCED,
    "select_words": SELECT_WORDS,
    "expand": EXPAND,
    "sample": SAMPLE,
    "join": JOIN,
    "adjust": ADJUST,
    "screen": SCREEN,
    "certain": CERTAIN,
    "tolerance": TOLERANCE,
    "map": MAP,
}


def route_text(centroids: StoredRows) -> KernelText:
    """The kernel that scores clusters by their centroids."""
    return KernelText(
        f"hidden {centroids.inputs} route_bias",
        "scores",
        ROUTE_BODY.format(rows=centroids.expression),
        files=f"{centroids.files} route",
        sizes=f"D C {centroids.names}",
        threads=LANES * ROUTE_SIMDGROUPS,
    )


def score_text(rows: StoredRows, cluster_size: int, *, biased: bool) -> KernelText:
    """The kernel that scores the tokens of clusters.

    Args:
        rows: The head's rows.
        cluster_size: Rows of a cluster.
        biased: Whether the rows have a bias.
    """
    inputs = f"hidden probes token_ids {rows.inputs}"
    bias = "flash_head::NoBias{}"
    if biased:
        inputs += " bias"
        bias = "bias"
    n_simdgroups = min(SCORE_SIMDGROUPS, -(-cluster_size // ROWS))
    return KernelText(
        inputs,
        "logits best",
        SCORE_BODY.format(rows=rows.expression, bias=bias),
        files=f"{rows.files} score",
        sizes=f"D N V PADDED {rows.names}",
        threads=LANES * n_simdgroups,
    )
