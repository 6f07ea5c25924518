"""What a step of several tokens costs, relative to a single one, on this machine."""

import copy
import time
from statistics import median
from typing import Any

import mlx.core as mx

from .wide import WideSteps

WIDTHS = (2, 4, 8)  # tokens of a step, of those that are timed
ROUNDS = 2


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
            began = time.perf_counter()
            step = steps.feed(mx.zeros((1, width), mx.uint32), caches)
            mx.eval(step.logits, [cache.state for cache in caches])
            if i:  # the first round compiles
                times.append(time.perf_counter() - began)
    single = median(seconds[1])
    return {width: median(seconds[width]) / single for width in taken}
