"""What the commands show: tables of one look, and quantities as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .command import from_extra

if TYPE_CHECKING:  # rich may be absent
    from rich.table import Table


def new_table(
    title: str | None, headings: Sequence[str], caption: str | None = None, *, left: int = 1
) -> "Table":
    """Makes an empty table of rich.

    Args:
        title: The text above it.
        headings: One for each column.
        caption: The text below it.
        left: The number of columns, from the left, that hold words; the others hold figures.
    """
    rich_table = from_extra("rich.table", "report", "A table")
    table = rich_table.Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=rich_table.box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < left else "right", no_wrap=True)
    return table


def show(*parts: "Table | str") -> None:
    """Prints tables, and lines of text between them.

    No figure is cut off: a table is wider than the screen where it must be.

    Args:
        parts: Tables and lines.
    """
    rich_console = from_extra("rich.console", "report", "A table")
    console = rich_console.Console(highlight=False, markup=False, emoji=False)
    screen = console.width
    for part in parts:
        console.width = screen
        if not isinstance(part, str):
            console.width = 10_000  # its full width is measured
            console.width = max(screen, console.measure(part).maximum)
        console.print(part)


def percent(share: float, decimals: int = 2) -> str:
    """A share as text, such as "99.80 %"."""
    return f"{100 * share:.{decimals}f} %"


def count(number: int, noun: str) -> str:
    """A number of things, such as "1 token" and "2 tokens"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def megabytes(nbytes: float) -> str:
    """A size, such as "1.2 MB"."""
    return f"{nbytes / 1e6:.1f} MB"
