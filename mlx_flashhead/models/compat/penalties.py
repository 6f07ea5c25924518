"""mlx-lm's biases and penalties, read from the closures of its processors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import getclosurevars
from types import FunctionType
from typing import Any, cast

import mlx.core as mx
from mlx_lm import sample_utils

from .recognised import nested_codes

BIAS = "bias"
REPETITION = "repetition"
PRESENCE = "presence"
FREQUENCY = "frequency"


@dataclass(frozen=True)
class Penalty:
    """What a processor of mlx-lm was made with.

    Attributes:
        effect: BIAS, REPETITION, PRESENCE or FREQUENCY.
        penalty: Of the last three.
        window: Tokens before a place that the penalty looks at.
        biases: By token.
    """

    effect: str
    penalty: float = 0.0
    window: int = 0
    biases: dict[int, float] = field(default_factory=dict)


# The code of mlx-lm's processors, by what makes them.
_CODES = {
    BIAS: nested_codes(sample_utils.make_logits_processors),
    REPETITION: nested_codes(sample_utils.make_repetition_penalty),
    PRESENCE: nested_codes(sample_utils.make_presence_penalty),
    FREQUENCY: nested_codes(sample_utils.make_frequency_penalty),
}


def penalty_of(processor: Any) -> Penalty | None:
    """What a processor of mlx-lm's makers changes; None for any other function."""
    if not isinstance(processor, FunctionType):
        return None
    for effect, codes in _CODES.items():
        if processor.__code__ in codes:
            values = getclosurevars(processor).nonlocals
            return _bias(values) if effect == BIAS else _penalty(effect, values)
    return None


def _bias(values: Mapping[str, Any]) -> Penalty | None:
    """The biases of a processor with these values; None for another function of its maker."""
    if not {"indices", "values"} <= values.keys():
        return None
    indices: Any = cast(mx.array, values["indices"]).tolist()
    biases: Any = cast(mx.array, values["values"]).tolist()
    return Penalty(BIAS, biases=dict(zip(indices, biases, strict=True)))


def _penalty(effect: str, values: Mapping[str, Any]) -> Penalty | None:
    """A penalty with these values; None for a window that mlx-lm reads from the other end."""
    window = values.get("context_size")
    if not isinstance(window, int) or window < 1:
        return None
    return Penalty(effect, float(values["penalty"]), window)
