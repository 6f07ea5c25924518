"""The bodies of the Metal kernels, one call each of a function in ``metal/flash_head/``."""

from functools import cache
from pathlib import Path

# A map of logits, whose template arguments LogitMap.template gives.
LOGIT_MAP = "flash_head::LogitMap<MAPPED, MULTIPLIER, DIVISOR, CAP>"

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
EXPAND_BODY = """
threadgroup uint shared[flash_head::WIDE_SIMDGROUPS];
flash_head::expand<V, C, N>(
    words, slot_of, logits, best, expanded, shared, best_shape[1], threadgroup_position_in_grid,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
SAMPLE_BODY = f"""
threadgroup atomic<uint> histogram[2 * flash_head::SAMPLE_BINS];
threadgroup uint shared[flash_head::SAMPLE_SHARED];
threadgroup float sums[flash_head::ROW_SUMS];
flash_head::sample<N, V, {LOGIT_MAP}, T>(
    probes, token_ids, logits, best, unscored, settings, top_k, keys, fit, tokens, risk, histogram,
    shared, sums, best_shape[1], threadgroup_position_in_grid.y, thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""

LOWEST_KEPT_BODY = """
threadgroup atomic<uint> histogram[2 * flash_head::SAMPLE_BINS];
threadgroup uint shared[flash_head::SAMPLE_SHARED];
threadgroup float sums[flash_head::ROW_SUMS];
flash_head::lowest_kept(
    logits, settings, top_k, log_total, kept, histogram, shared, sums, logits_shape[1],
    threadgroup_position_in_grid.y, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
"""
SCREEN_BODY = f"""
threadgroup atomic<uint> marks[flash_head::SCREEN_CLUSTERS / 32];
threadgroup uint place[1];
threadgroup float shared[flash_head::TALLY * flash_head::WIDE_SIMDGROUPS];
flash_head::screen<C, N, V, PADDED, MASKED, {LOGIT_MAP}>(
    slots, probes, token_ids, slot_of, logits, tokens, settings, keys, product_tolerance,
    scored_tolerance, relative, allowed, parts, marks, place, shared, logits_shape[1],
    threadgroups_per_grid.x, threadgroup_position_in_grid, thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
CERTAIN_BODY = f"""
threadgroup float shared[(flash_head::TALLY + 2) * flash_head::ROW_SIMDGROUPS];
flash_head::certain<N, V, {LOGIT_MAP}, T>(
    parts, probes, token_ids, logits, tokens, settings, top_k, keys, product_tolerance,
    scored_tolerance, relative, epsilon, sure, known, shared, logits_shape[1], parts_shape[1],
    threadgroup_position_in_grid.y, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
"""
ADJUST_BODY = """
flash_head::adjust<N, V, T>(
    probes, token_ids, logits, adjustment, latest, allowed, changed, best, probes_shape[1],
    adjustment_shape[1], allowed_shape[1], threadgroup_position_in_grid.y,
    thread_position_in_grid.x);
"""
TOLERANCE_BODY = """
threadgroup float shared[flash_head::WIDE_SIMDGROUPS];
flash_head::tolerance<D>(
    hidden, shares, product, scored, shared, threadgroup_position_in_grid.y,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
MAP_BODY = f"""
flash_head::map_values<{LOGIT_MAP}>(values, mapped, values_shape[0], thread_position_in_grid.x);
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


@cache
def part(name: str) -> str:
    """The text of one file of the kernels: of the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    folder = package if (package / "metal").is_dir() else package.parent
    return (folder / "metal" / "flash_head" / f"{name}.h").read_text(encoding="utf-8")


# Threads of a threadgroup in kernels with one threadgroup a position; fewer where a pipeline allows
# no more.
ROW_THREADS = 512
FEWER_THREADS = 256


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
