"""The table and the picture of servers under load."""

from itertools import groupby
from typing import TYPE_CHECKING

from ..common.tables import new_table
from .server import FLASH_HEAD, MLX_LM

if TYPE_CHECKING:
    from rich.table import Table


def server_table(one: dict) -> "Table":
    """The figures of :func:`.server.server_benchmark`."""
    table = new_table(
        f"{one['model']}: {one['requests']} requests for each number of clients, answers of at "
        f"most {one['tokens']} tokens",
        ("clients", "server", "tokens/s", "first s", "worst", "as alone", "MB"),
        "tokens/s: of all clients together. first s: seconds to the first text, the median.\n"
        "as alone: answers with the text that the question has alone; others hung up.\n"
        f"MB: resident memory at the beginning and the end. {outcome(one)}",
        left=2,
    )
    for n, loads in groupby(one["loads"], key=lambda load: load["clients"]):
        for number, load in enumerate(loads):
            first = load["first_seconds"]
            table.add_row(
                "" if number else str(n),
                load["server"],
                f"{load['tokens_per_second']['median']:.1f}",
                _seconds(first["median"]),
                _seconds(first["worst"]),
                f"{load['as_alone']} of {load['answered']}",
                f"{load['memory_mb'][0][0]:,.0f} → {load['memory_mb'][-1][-1]:,.0f}",
            )
        table.add_section()
    return table


def outcome(one: dict) -> str:
    """Sentences on the answers that were lost or mixed up."""
    lost = sum(load["lost"] for load in one["loads"])
    anothers = sum(load["anothers"] for load in one["loads"])
    if not (lost or anothers):
        return "No answer was lost, none was another question's."
    told = [problem for load in one["loads"] for problem in load["problems"]]
    return "\n".join([f"Lost: {lost}. Of another question: {anothers}.", *told[:5]])


def draw_server(axis, one: dict) -> None:
    """Draws the tokens per second."""
    for load in one["loads"]:
        color = {FLASH_HEAD: "tab:blue", MLX_LM: "tab:gray"}.get(load["server"], "tab:orange")
        name = f"{load['clients']} at once, {load['server']}"
        bar = axis.barh(name, load["tokens_per_second"]["median"], color=color)
        axis.bar_label(bar, fmt=" %.1f")
    axis.set(title=one["model"], xlabel="tokens/s of all clients")
    axis.margins(x=0.1)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
