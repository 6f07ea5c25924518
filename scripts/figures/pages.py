"""Tables in the pages of this checkout, between comments that name them."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def line(*cells: str) -> str:
    """Formats a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def with_block(page: str, name: str, lines: list[str]) -> str:
    """The page with other lines between the comments of a block, if it has them."""
    begin = f"<!-- {name} -->\n"
    end = f"<!-- end of {name} -->"
    block = begin + "".join(f"{one}\n" for one in lines) + end
    return re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: block, page)
