"""What a model does to each of its head's logits, as numbers: a scale, a softcap, a cast.

Gemma 2 to 4, Cohere, Granite, nanochat and others give logits that are a rising function of the
head's. Each operation that looks at logits applies these numbers to what it looks at.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from .margins import MAP_ULPS

# Logits of any shape → as many.
Function = Callable[[mx.array], mx.array]

# The inverse of a cap is cut off above this share of the cap.
NEAR_CAP = 1 - 1e-6
# At such a logit a softcap is reached.
HUGE = 1e30
# A map is confirmed on so many values. In 16 bits these are all.
N_VALUES = 1 << 16


@dataclass(frozen=True)
class LogitMap:
    """A rising map of each logit by itself, its operations in this order.

    Each is rounded to ``dtype``.

    y = cap · tanh(x · multiplier / divisor / cap), without the operations that change nothing.

    Attributes:
        multiplier: Of the logits.
        divisor: Of what that gives.
        cap: Of what that gives; 0: none.
        dtype: Of the result: the logits are cast first. None: as they are.
    """

    multiplier: float = 1.0
    divisor: float = 1.0
    cap: float = 0.0
    dtype: mx.Dtype | None = None

    def __call__(self, logits: mx.array) -> mx.array:
        """The mapped logits, by the operations that the models use: any shape → the same."""
        mapped = logits
        if self.dtype is not None:
            mapped = mapped.astype(self.dtype)
        if self.multiplier != 1:
            mapped = mapped * self.multiplier
        if self.divisor != 1:
            mapped = mapped / self.divisor
        if self.cap:
            mapped = mx.tanh(mapped / self.cap) * self.cap
        return mapped

    @property
    def identity(self) -> bool:
        """Whether logits stay as they are."""
        return self.n_roundings == 0 and self.dtype is None

    @property
    def slope(self) -> float:
        """The most that the map can stretch a distance."""
        return self.multiplier / self.divisor

    @property
    def n_roundings(self) -> int:
        """Operations that round their result."""
        n_roundings = 0
        if self.multiplier != 1:
            n_roundings += 1
        if self.divisor != 1:
            n_roundings += 1
        if self.cap != 0:
            n_roundings += 3
        return n_roundings

    def result_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """The dtype of mapped logits of ``dtype``."""
        return self.dtype or dtype

    def inverse(self, mapped: mx.array) -> mx.array:
        """An estimate of the logits before the map: float32 → float32."""
        if self.cap:
            share = mx.clip(mapped / self.cap, -NEAR_CAP, NEAR_CAP)
            mapped = mx.arctanh(share) * self.cap
        return mapped / self.slope

    def slack(self, dtype: mx.Dtype) -> float:
        """How far values of ``dtype`` may fail to rise, relative. In 16 bits all were looked at."""
        if self.identity or self.result_dtype(dtype) != mx.float32:
            return 0.0
        return MAP_ULPS * mx.finfo(mx.float32).eps

    def rounding(self, dtype: mx.Dtype) -> float:
        """How far the roundings of two values of ``dtype`` may move them apart, relative."""
        return self.n_roundings * mx.finfo(self.result_dtype(dtype)).eps

    def template(self, dtype: mx.Dtype) -> dict[str, Any]:
        """Returns the template arguments of a kernel for logits of ``dtype``.

        A number is given by its bits as a float32; 0 leaves its operation out.
        """
        mapped = self.result_dtype(dtype)

        arguments: dict[str, Any] = {"MAPPED": mapped, "MULTIPLIER": 0, "DIVISOR": 0, "CAP": 0}
        if self.multiplier != 1:
            arguments["MULTIPLIER"] = _bits(self.multiplier, mapped)
        if self.divisor != 1:
            arguments["DIVISOR"] = _bits(self.divisor, mapped)
        if self.cap != 0:
            arguments["CAP"] = _bits(self.cap, mapped)
        return arguments


def _bits(number: float, dtype: mx.Dtype) -> int:
    """The bits of a number, rounded to a dtype, as a float32."""
    value = mx.array(number, dtype).astype(mx.float32)
    return cast(int, value.view(mx.int32).item())


IDENTITY = LogitMap()


def fit_logit_map(function: Function, dtype: mx.Dtype) -> LogitMap | None:
    """Finds the map that does what ``function`` does to logits of ``dtype``.

    They agree to the last bit for N_VALUES logits. Evaluates.

    Returns:
        The map, or None if the function has another form.
    """
    values = all_values(dtype)
    expected = function(values)
    for candidate in _candidates(function, values.dtype, expected.dtype):
        if mx.array_equal(candidate(values), expected).item() and _rises(candidate, values):
            return candidate
    return None


def all_values(dtype: mx.Dtype) -> mx.array:
    """Finite logits (N_VALUES,) in rising order: in 16 bits all of them, else random ones."""
    if dtype == mx.float32:
        values = np.random.default_rng(0).normal(scale=40, size=N_VALUES).astype(np.float32)
        values[::64] *= 1e-4
        values[::63] *= 1e4
        return mx.array(np.sort(values))
    patterns = mx.arange(N_VALUES, dtype=mx.uint32).astype(mx.uint16).view(dtype)
    finite = mx.where(mx.isfinite(patterns), patterns, mx.zeros_like(patterns))
    return mx.sort(finite)


def _rises(candidate: LogitMap, rising: mx.array) -> bool:
    mapped = candidate(rising).astype(mx.float32)
    lower = mapped[:-1]
    higher = mapped[1:]
    slack = candidate.slack(rising.dtype) * mx.abs(higher)
    rises = higher >= lower - slack
    return bool(rises.all().item())


def _candidates(function: Function, dtype: mx.Dtype, result: mx.Dtype) -> Iterator[LogitMap]:
    """Maps that ``function`` may be, by what it makes of a tiny and a huge logit in float32."""
    cast_to = None
    if dtype != result:
        cast_to = result
    given = mx.array([2.0**-10, HUGE], mx.float32)
    made = function(given).astype(mx.float32)
    tiny, huge = cast(list[float], made.tolist())
    slope = tiny * 2.0**10
    if not (slope > 0 and huge > 0 and np.isfinite([slope, huge]).all()):
        return
    cap = 0.0
    if huge < slope * HUGE / 2:
        cap = huge
    for multiplier in _near(slope):
        yield LogitMap(multiplier=multiplier, cap=cap, dtype=cast_to)
    for divisor in _near(1 / slope):
        yield LogitMap(divisor=divisor, cap=cap, dtype=cast_to)


def _near(number: float) -> list[float]:
    """Numbers that ``number`` may be but for rounding: those of few digits first."""
    near = []
    for digits in range(1, 8):
        short = float(f"{number:.{digits}g}")
        if abs(short / number - 1) < 1e-5:
            near.append(short)
    spacing = 2.0**-24
    for i in range(-8, 9):
        around = np.float32(number * (1 + i * spacing))
        near.append(float(around))
    return list(dict.fromkeys(near))
