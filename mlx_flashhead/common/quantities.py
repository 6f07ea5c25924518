"""Quantities as text."""


def percent(share: float, decimals: int = 2) -> str:
    """A share as text, such as "99.80 %"."""
    return f"{100 * share:.{decimals}f} %"


def count(number: int, noun: str) -> str:
    """A number of things, such as "1 token" and "2 tokens"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def megabytes(nbytes: float) -> str:
    """A size, such as "1.2 MB"."""
    return f"{nbytes / 1e6:.1f} MB"
