"""mlx-lm's biases and penalties, read from the closures of its processors."""

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
        kind: BIAS, REPETITION, PRESENCE or FREQUENCY.
        penalty: Of the last three.
        window: Tokens before a place that the penalty looks at.
        biases: By token.
    """

    kind: str
    penalty: float = 0.0
    window: int = 0
    biases: dict[int, float] = field(default_factory=dict)


_KINDS = {
    code: kind
    for maker, kind in (
        (sample_utils.make_logits_processors, BIAS),
        (sample_utils.make_repetition_penalty, REPETITION),
        (sample_utils.make_presence_penalty, PRESENCE),
        (sample_utils.make_frequency_penalty, FREQUENCY),
    )
    for code in nested_codes(maker)
}


def penalty_of(processor: Any) -> Penalty | None:
    """What a processor of mlx-lm's makers changes; None for any other function."""
    kind = _KINDS.get(processor.__code__) if isinstance(processor, FunctionType) else None
    if kind is None:
        return None
    values = getclosurevars(processor).nonlocals
    if kind == BIAS:
        if not {"indices", "values"} <= values.keys():
            return None  # another function of this maker
        indices: Any = cast(mx.array, values["indices"]).tolist()
        biases: Any = cast(mx.array, values["values"]).tolist()
        return Penalty(BIAS, biases=dict(zip(indices, biases, strict=True)))
    window = values.get("context_size")
    if not isinstance(window, int) or window < 1:
        return None  # which mlx-lm reads from the other end
    return Penalty(kind, float(values["penalty"]), window)
