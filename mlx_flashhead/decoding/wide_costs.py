"""What a step of several tokens costs, relative to a single one, on this machine.

Single steps are launched before the one before them is read, as a text's are. What follows a wide
step waits for its tokens, so that the host's time counts there.
"""

import copy
import time
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .wide import WideSteps

WIDTHS = (2, 4, 8)  # tokens of a step, of those that are timed
ROUNDS = 2
SINGLE_STEPS = 6  # of a round, one behind the other


def measured_costs(steps: WideSteps, layers: list[Any], widths: list[int]) -> dict[int, float]:
    """Times steps in turns. Evaluates.

    Args:
        steps: Of a model.
        layers: Caches of the kind for which the widths are established.
        widths: Tokens of a step that are.

    Returns:
        The median time of a step by its tokens, relative to a step of one token.
    """
    taken = [width for width in WIDTHS if width in widths]
    seconds: dict[int, list[float]] = {width: [] for width in (1, *taken)}
    for i in range(ROUNDS + 1):
        for width, times in seconds.items():
            caches = copy.deepcopy(layers)
            taken_s = _wide_s(steps, caches, width) if width > 1 else _single_s(steps.model, caches)
            if i:  # the first round compiles
                times.append(taken_s)
    single = median(seconds[1])
    return {width: median(seconds[width]) / single for width in taken}


def _single_s(model: nn.Module, caches: list[Any]) -> float:
    latest = mx.zeros((1, 1), mx.uint32)
    began = time.perf_counter()
    for _ in range(SINGLE_STEPS):
        latest = mx.argmax(model(latest, cache=caches)[:, -1:], axis=-1)
        mx.async_eval(latest)
    mx.eval(latest, [cache.state for cache in caches])
    return (time.perf_counter() - began) / SINGLE_STEPS


def _wide_s(steps: WideSteps, caches: list[Any], width: int) -> float:
    began = time.perf_counter()
    step = steps.feed(mx.zeros((1, width), mx.uint32), caches)
    mx.eval(step.logits, [cache.state for cache in caches])
    return time.perf_counter() - began
