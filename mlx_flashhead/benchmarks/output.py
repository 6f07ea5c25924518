"""The tables of ``benchmark``, 80 columns wide."""

from typing import TYPE_CHECKING

from ..common.quantities import percent
from ..common.tables import new_table, show
from .conversion import TOTAL
from .head import CANDIDATES, LOGITS, TOKEN
from .head import DENSE as DENSE_HEAD
from .model import DENSE, FLASH_HEAD, NO_HEAD
from .positions import DENSE_PATH
from .sampler import MLX_LM, OURS
from .server_output import server_table

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("body", "head", "sampling")


def print_result(result: dict) -> None:
    """Prints the tables of one benchmark, then the machine."""
    tables = {
        "head": _head_table,
        "positions": _positions_table,
        "model": _model_table,
        "convert": _convert_table,
        "first-use": _first_use_table,
        "sampler": _sampler_table,
        "draft": _draft_table,
        "host": _host_table,
        "memory": _memory_table,
        "server": server_table,
    }
    make_table = tables[result["kind"]]
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    show(
        *map(make_table, result["results"]),
        f"{about['processor']}, {about['cores']} cores, {about['blas']}; {about['system']}; "
        f"{versions}; {about['date']}",
    )


def _head_table(one: dict) -> "Table":
    table = new_table(
        f"{_head_title(one)}, batch {one['positions']}",
        ("", "ms", "quartiles", "vs mlx-lm", "vs best dense"),
        f"Reads {one['read_mb']:.1f} MB of weights, dense {one['head_mb']:.1f} MB; cold caches.",
    )
    for name, ms in one["ms"].items():
        ratios = ("", "")
        if name in (CANDIDATES, TOKEN, LOGITS):
            mlx_lm = next(v for k, v in one["times_faster"].items() if k.startswith(name))
            best = one["times_faster"][f"{name} against {one['best_dense']}"]
            ratios = (f"{mlx_lm:.1f} x", f"{best:.1f} x")
        table.add_row(name, f"{ms['median']:.2f}", _quartiles(ms), *ratios)
    for name, ms in one.get("gpu_ms", {}).items():
        table.add_row(f"{name}, GPU alone", f"{ms['median']:.3f}", _quartiles(ms), "", "")
    return table


def _head_title(one: dict) -> str:
    return (
        f"{one['name']}: V={one['vocab_size']:,} D={one['hidden_size']:,}, {one['head_bits']}-bit "
        f"rows, {one['dtype']}, {one['n_probes']:,} of {one['n_clusters']:,} clusters"
    )


def _positions_table(one: dict) -> "Table":
    table = new_table(
        _head_title(one),
        ("at once", DENSE_HEAD, "dense here", "quartiles", "FlashHead", "quartiles", "faster"),
        f"ms for full logits, cold caches. {crossover_sentence(one)}",
    )
    ms = one["ms"]
    forms = (ms[DENSE_HEAD], ms[DENSE_PATH], ms[LOGITS])
    for count, stock, dense, flash in zip(one["counts"], *forms, strict=True):
        table.add_row(
            str(count),
            _short(stock["median"]),
            _short(dense["median"]),
            f"{_short(dense['lower'])}–{_short(dense['upper'])}",
            _short(flash["median"]),
            f"{_short(flash['lower'])}–{_short(flash['upper'])}",
            f"{dense['median'] / flash['median']:.2f} x",
        )
    return table


def _short(ms: float) -> str:
    """Milliseconds in five characters: 0.93, 12.34, 123.4, 12345."""
    return f"{ms:.{max(0, 4 - len(str(int(ms)))) if ms >= 100 else 2}f}"


def crossover_sentence(one: dict) -> str:
    """A sentence that says from how many positions on the dense path is faster."""
    last, first = one["crossover"]["last_faster"], one["crossover"]["slower_from"]
    if first is None:
        said = f"FlashHead is still faster at {last} positions, the most that were measured"
    elif last is None:
        said = f"dense is faster from {first} on, the fewest positions that were measured"
    else:
        said = f"FlashHead is still faster at {last} positions, dense from {first} on"
    limit = f"{one['max_positions']}, {one['max_positions_reason']}"
    return f"Crossover: {said} (max_positions: {limit})."


def _model_table(one: dict) -> "Table":
    lower, upper = one["share_of_free_head_saved_quartiles"]
    table = new_table(
        f"{one['model']}: {one['sampler']}, batch {one['batch']}, {one['n_probes']:,} of "
        f"{one['n_clusters']:,} clusters",
        ("", "tokens/s", "quartiles", "ms", "body", "head", "sampling"),
        f"{one['times_faster']:.2f} times as fast; a free head: "
        f"{one['times_faster_with_a_free_head']:.2f}. "
        f"Saved: {percent(one['share_of_free_head_saved'], 1)} of what a free head would save "
        f"(quartiles {percent(lower, 0)}–{percent(upper, 0)}).",
    )
    for name in (DENSE, FLASH_HEAD, NO_HEAD):
        speed = one["tokens_per_second"][name]
        split = one["split_ms"].get(name)
        table.add_row(
            name,
            f"{speed['median']:.1f}",
            _quartiles(speed),
            f"{one['step_ms'][name]['median']:.2f}",
            *(f"{split[part]:.2f}" if split else "" for part in PARTS),
        )
    return table


def _convert_table(one: dict) -> "Table":
    name = one.get("name") or one["model"]
    table = new_table(
        f"Conversion of {name}", ("stage", "s"), f"Peak of memory: {one['peak_memory_mb']:,.0f} MB"
    )
    for stage, seconds in one["seconds"].items():
        table.add_row(stage, f"{seconds:.1f}", style="bold" if stage == TOTAL else None)
    return table


def _first_use_table(one: dict) -> "Table":
    table = new_table(
        f"First use of {one['model']}: {one['n_probes']:,} of {one['n_clusters']:,} clusters",
        ("stage", "s", "second use, s"),
    )
    for stage, seconds in one["seconds"].items():
        again = one["again"].get(stage)
        table.add_row(
            stage,
            f"{seconds:.1f}",
            "" if again is None else f"{again:.1f}",
            style="bold" if stage == TOTAL else None,
        )
    return table


def _sampler_table(one: dict) -> "Table":
    table = new_table(
        f"{one['name']}: V={one['vocab_size']:,}, {one['n_probes']:,} of {one['n_clusters']:,} "
        f"clusters, batch {one['positions']}",
        ("sampler", "mlx-lm ms", "quartiles", "FlashHead ms", "quartiles", "ratio"),
    )
    for name, ms in one["ms"].items():
        cells = []
        for form in (MLX_LM, OURS):
            cells += [f"{ms[form]['median']:.2f}", _quartiles(ms[form])]
        table.add_row(name, *cells, f"{one['times_faster'][name]:.1f} x")
    return table


def _draft_table(one: dict) -> "Table":
    table = new_table(
        f"{one['draft_model']} drafts {one['num_draft_tokens']} tokens for {one['model']}",
        ("draft", "tokens/s", "quartiles", "accepted", "same answers"),
        f"{one['answers']} greedy answers of {one['tokens']} tokens. accepted: of the drafted "
        "tokens;\nsame answers: as without a draft.",
    )
    for form in one["forms"]:
        speed, accepted = form["tokens_per_second"], form["acceptance"]
        table.add_row(
            form["name"],
            f"{speed['median']:.1f}",
            _quartiles(speed),
            "–" if accepted is None else percent(accepted, 1),
            percent(form["same_answers"], 0),
        )
    return table


def _host_table(one: dict) -> "Table":
    table = new_table(
        f"{one['name']}: V={one['vocab_size']:,} D={one['hidden_size']:,}, {one['n_probes']:,} of "
        f"{one['n_clusters']:,} clusters",
        ("host's time per token", "µs", "quartiles"),
        "The kernels are recorded, not run.",
    )
    for name, us in one["us"].items():
        table.add_row(name, f"{us['median']:.1f}", _quartiles(us))
    return table


def _memory_table(one: dict) -> "Table":
    table = new_table(
        f"{one['name']}: {one['form']} rows, a head of {one['head_mb']:,.0f} MB",
        ("", "peak MB", "held MB", "process MB"),
        f"Installing takes {one['more_heads']:.2f} heads more than the dense model holds.",
    )
    for name, taken in one["memory"].items():
        cells = (taken["peak_mb"], taken["held_mb"], taken["process_peak_mb"])
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells))
    return table


def _quartiles(spread: dict) -> str:
    return f"{spread['lower']:.2f}–{spread['upper']:.2f}"
