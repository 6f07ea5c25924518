"""What the commands show: tables of one look, and quantities as text."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .command import from_extra

# rich may be absent.
if TYPE_CHECKING:
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
    rich_text = from_extra("rich.text", "report", "A table")
    # rich would break a path that is wider than the table.
    above = title and rich_text.Text(title, "table.title", overflow="ignore")
    table = rich_table.Table(
        title=above,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=rich_table.box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in headings[:left]:
        table.add_column(heading, justify="left", no_wrap=True)
    for heading in headings[left:]:
        table.add_column(heading, justify="right", no_wrap=True)
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
        if isinstance(part, str):
            print(textwrap.fill(part, screen, break_long_words=False, break_on_hyphens=False))
        else:
            # The table's full width is measured.
            console.width = 10_000
            console.width = max(screen, console.measure(part).maximum)
            console.print(part, crop=False)


def percent(share: float, decimals: int = 2) -> str:
    """A share as text, such as "99.80 %"."""
    return f"{100 * share:.{decimals}f} %"


def count(number: int, noun: str) -> str:
    """A number of things, such as "1 token" and "2 tokens"."""
    if number == 1:
        return f"{number:,} {noun}"
    return f"{number:,} {noun}s"


def megabytes(nbytes: float) -> str:
    """A size, such as "1.2 MB"."""
    return f"{nbytes / 1e6:.1f} MB"
