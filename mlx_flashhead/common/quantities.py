"""Quantities as text."""


def percent(share: float, decimals: int = 2) -> str:
    """A share as text, such as "99.80 %"."""
    return f"{100 * share:.{decimals}f} %"
