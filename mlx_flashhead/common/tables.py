"""Tables of the commands, of one look. They fit 80 columns or are as wide as their figures."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from .extras import from_extra

if TYPE_CHECKING:
    from rich.table import Table
else:
    Table = object  # rich may be absent

FOLDED = 12  # columns that a column which folds keeps
UNLIMITED = 10_000  # columns of a table when its width is measured


def new_table(
    title: str | None,
    headings: Sequence[str],
    caption: str | None = None,
    *,
    left: int = 1,
) -> "Table":
    """An empty table of rich; ``left`` columns hold words, the others figures.

    Raises:
        ValueError: If rich is not installed.
    """
    table = _rich("table").Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=_rich("box").SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < left else "right", no_wrap=True)
    return table


def show(*parts: "Table | str") -> None:
    """Prints tables, and lines of text between them.

    No figure is cut off: a table is as wide as the screen, or wider where it must be. A column
    that folds makes way first.
    """
    console = _rich("console").Console(highlight=False, markup=False, emoji=False)
    screen = console.width
    for part in parts:
        console.width = screen
        if not isinstance(part, str):
            console.width = UNLIMITED
            width = console.measure(part).maximum
            for column in part.columns:
                if not column.no_wrap:
                    widest = max(len(str(cell)) for cell in column.cells)
                    width -= max(0, widest - FOLDED)
            console.width = max(screen, width)
        console.print(part)


def _rich(name: str) -> ModuleType:
    return from_extra(f"rich.{name}", "report", "A table")
