"""Regular expressions of numbers within bounds.

Each is one union without intersections: llguidance fails at a special token after a text that it
takes for unfinished, as the intersection of two expressions may look.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

# Digits before the point, so that every integer is exact as a float.
MAX_DIGITS = 15
_LARGEST = 10**MAX_DIGITS - 1
_FRACTION = r"(\.[0-9]{1,15})?"
_ANY_DIGITS = "[0-9]{0,15}"
_SOME_NOT_ZERO = "0{0,9}[1-9][0-9]{0,9}"  # digits that are more than zero
ANY_INTEGER = rf"-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})"
ANY_NUMBER = ANY_INTEGER + _FRACTION + "([eE][+-]?[0-9]{1,2})?"


@dataclass(frozen=True)
class Bound:
    """A limit of numbers."""

    value: Decimal
    exclusive: bool = False

    @property
    def digits(self) -> tuple[int, str]:
        """The number before the point, and the digits after it without zeros at the end."""
        whole, _, fraction = f"{self.value:f}".partition(".")
        return int(whole), fraction.rstrip("0")

    def negated(self) -> "Bound":
        """Returns the bound of the numbers with the opposite sign."""
        return Bound(-self.value, self.exclusive)


def bounds_of(schema: dict[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The lower and the upper limit that a plain schema sets to numbers.

    Raises:
        ValueError: If a limit is beyond the numbers that are written.
    """
    limits = []
    for inclusive, exclusive, sign in (
        ("minimum", "exclusiveMinimum", 1),
        ("maximum", "exclusiveMaximum", -1),
    ):
        found = []
        for name in (inclusive, exclusive):
            if name in schema:
                found.append(Bound(sign * Decimal(str(schema[name])), name == exclusive))
        tightest = max(found, key=lambda bound: (bound.value, bound.exclusive), default=None)
        if tightest is not None and tightest.value > _LARGEST:
            raise ValueError(f"numbers of more than {MAX_DIGITS} digits are not supported")
        if tightest is not None and tightest.value < -_LARGEST:
            tightest = None
        limits.append(tightest)
    lower, upper = limits
    return lower, None if upper is None else upper.negated()


def integer_regex(lower: Bound | None, upper: Bound | None, factor: Any = 1) -> str | None:
    """The integers within bounds that are multiples of a factor; None if there are none.

    Raises:
        ValueError: If the factor divides none of 10, 100 and 1,000.
    """
    smallest = -_LARGEST
    largest = _LARGEST
    if lower is not None:
        smallest = int(lower.value.to_integral_value(ROUND_CEILING))
        smallest += lower.exclusive and smallest == lower.value
    if upper is not None:
        largest = int(upper.value.to_integral_value(ROUND_FLOOR))
        largest -= upper.exclusive and largest == upper.value
    step = _step_of(factor)
    branches = [*_multiples(max(0, smallest), largest, step)]
    branches += [f"-{branch}" for branch in _multiples(max(1, -largest), -smallest, step)]
    return f"({'|'.join(branches)})" if branches else None


def number_regex(lower: Bound | None, upper: Bound | None) -> str | None:
    """The numbers within bounds; None if there are none."""
    if lower is None and upper is None:
        return ANY_NUMBER
    zero = Bound(Decimal(0))
    branches = []
    if upper is None or upper.value >= 0:
        from_zero = lower if lower is not None and lower.value >= 0 else zero
        branches += _magnitudes(from_zero, upper)
    if lower is None or lower.value < 0:
        smallest = zero if upper is None or upper.value >= 0 else upper.negated()
        largest = None if lower is None else lower.negated()
        # minus zero is no number below another one
        exclusive = smallest.exclusive or (smallest.value == 0)
        magnitudes = _magnitudes(Bound(smallest.value, exclusive), largest)
        branches += [f"-{branch}" for branch in magnitudes]
    return f"({'|'.join(branches)})" if branches else None


def _step_of(factor: Any) -> tuple[int, int]:
    """The factor, and the smallest of 10, 100 and 1,000 that it divides."""
    for modulus in (1, 10, 100, 1000):
        if factor > 0 and factor == int(factor) and modulus % factor == 0:
            return int(factor), modulus
    raise ValueError(f'"multipleOf" {factor} is not supported')


def _multiples(smallest: int, largest: int, step: tuple[int, int]) -> Iterator[str]:
    """The multiples within bounds, none of which is negative."""
    factor, modulus = step
    if smallest > largest:
        return
    if modulus == 1:
        yield from _integers(smallest, largest)
        return
    n_digits = len(str(modulus)) - 1
    for end in range(0, modulus, factor):
        if smallest <= end <= largest:
            yield str(end)
        first = max(1, -(-(smallest - end) // modulus))
        for branch in _integers(first, (largest - end) // modulus):
            yield f"{branch}{end:0{n_digits}}"


def _integers(smallest: int, largest: int) -> Iterator[str]:
    """The integers within bounds, none of which is negative."""
    while smallest <= largest:
        digits = str(smallest)
        # the longest run of nines at the end that stays within the bounds
        n_free = 0
        while n_free < len(digits):
            last = smallest // 10 ** (n_free + 1) * 10 ** (n_free + 1) + 10 ** (n_free + 1) - 1
            is_aligned = smallest % 10 ** (n_free + 1) == 0 and n_free + 1 < len(digits)
            if not is_aligned or last > largest:
                break
            n_free += 1
        unit = 10**n_free
        digit = smallest // unit % 10
        highest = min(9, digit + (largest - smallest + 1) // unit - 1)
        rest = f"[0-9]{{{n_free}}}" if n_free else ""
        head = digits[: len(digits) - n_free - 1]
        yield f"{head}[{digit}-{highest}]{rest}" if highest > digit else f"{head}{digit}{rest}"
        smallest += (highest - digit + 1) * unit


def _magnitudes(lower: Bound, upper: Bound | None) -> list[str]:
    """The numbers within bounds, none of which is negative."""
    first, low = lower.digits
    if upper is None:
        rest = [f"{branch}{_FRACTION}" for branch in _integers(first + 1, _LARGEST)]
        return [*_fractions(first, low, None, lower, None), *rest]
    last, high = upper.digits
    is_empty = lower.value == upper.value and (lower.exclusive or upper.exclusive)
    if lower.value > upper.value or is_empty:
        return []
    if first == last:
        return _fractions(first, low, high, lower, upper)
    between = [f"{branch}{_FRACTION}" for branch in _integers(first + 1, last - 1)]
    begin = _fractions(first, low, None, lower, None)
    return [*begin, *between, *_fractions(last, "", high, Bound(Decimal(last)), upper)]


def _fractions(
    whole: int, low: str, high: str | None, lower: Bound, upper: Bound | None
) -> list[str]:
    """Numbers of one number before the point, whose digits after it are within bounds."""
    branches = []
    if not low and not lower.exclusive and (high or upper is None or not upper.exclusive):
        branches.append(str(whole))
    if high is None:
        digits = _digits_above(low, lower.exclusive)
    else:
        exclusive = lower.exclusive, upper is not None and upper.exclusive
        digits = _digits_between(low, high, *exclusive)
    branches += [rf"{whole}\.{text}" for text in digits]
    return branches


def _digits_above(low: str, exclusive: bool) -> list[str]:
    """The digits after a point, at least one, of a fraction from ``low`` on."""
    branches = [
        f"{low[:i]}[{int(digit) + 1}-9]{_ANY_DIGITS}" for i, digit in enumerate(low) if digit != "9"
    ]
    if exclusive:
        branches.append(f"{low}{_SOME_NOT_ZERO}")
    else:
        branches.append(f"{low}{_ANY_DIGITS}" if low else "[0-9]{1,15}")
    return branches


def _digits_below(high: str, exclusive: bool) -> list[str]:
    """The digits after a point, or after others, of a fraction up to ``high``; perhaps none."""
    branches = [
        f"{high[:i]}([0-{int(digit) - 1}]{_ANY_DIGITS})?"
        for i, digit in enumerate(high)
        if digit != "0"
    ]
    if not exclusive:
        branches.append(f"{high}0{{0,9}}")
    return branches


def _digits_between(low: str, high: str, above: bool, below: bool) -> list[str]:
    """The digits after a point, at least one, of a fraction between two others."""
    length = max(len(low), len(high), 1)
    low = low.ljust(length, "0")
    high = high.ljust(length, "0")
    same = next((i for i in range(length) if low[i] != high[i]), length)
    shared = low[:same]
    if same == length:
        return [] if above or below else [f"{shared}0{{0,9}}"]
    first = int(low[same])
    last = int(high[same])
    branches = []
    rest = low[same + 1 :].rstrip("0")
    if rest or above:
        branches += [f"{shared}{first}{text}" for text in _digits_above(rest, above)]
    else:
        branches.append(f"{shared}{first}{_ANY_DIGITS}")
    if last - first > 1:
        branches.append(f"{shared}[{first + 1}-{last - 1}]{_ANY_DIGITS}")
    for text in _digits_below(high[same + 1 :].rstrip("0"), below):
        branches.append(f"{shared}{last}{text}")
    return branches
