"""What Python and MLX's graph take of a token's time before the device has its work.

It is the time of the thread that runs the loop, without what it waits: on a fast chip a step cannot
be shorter.
"""

import itertools
import time
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flashhead.benchmarks import SAMPLERS
from mlx_flashhead.benchmarks.variants import DENSE, FLASH_HEAD, Variant, with_flash_head
from mlx_flashhead.models.compat.mlx_lm import sample_utils
from mlx_flashhead.models.install import dense_copy

N_TOKENS = 64
# So many tokens of a text are not timed: after them a verification takes many.
FIRST = 16
RUNS = 3
PENALTY = {"repetition_penalty": 1.1}


def host_times(model: nn.Module, prompt: list[int], runs: int = RUNS) -> dict[str, Any]:
    """Measures mlx-lm's loop and FlashHead's, in turns.

    Args:
        model: A model with a FlashHead.
        prompt: Token ids.
        runs: Of each loop.

    Returns:
        For each kind of text (greedy, top-p, a penalty) the median microseconds of the loop's
        thread for a token, by loop, and FlashHead's relative to mlx-lm's: JSON-ready.
    """
    loops = {DENSE: Variant(dense_copy(model)), FLASH_HEAD: with_flash_head(model, verify=True)}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "top-p": {"sampling": SAMPLERS["top-p"]},
        "penalty": {"penalties": PENALTY},
    }
    found: dict[str, Any] = {}
    for kind, settings in kinds.items():
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _, (name, variant) in itertools.product(range(runs), loops.items()):
            times[name].append(1e6 * _thread_seconds(variant, prompt, **settings))
        medians = {name: median(each) for name, each in times.items()}
        found[kind] = medians | {"relative": medians[FLASH_HEAD] / medians[DENSE]}
    return found


def _thread_seconds(
    variant: Variant,
    prompt: list[int],
    sampling: dict[str, Any] | None = None,
    penalties: dict[str, Any] | None = None,
) -> float:
    """This thread's mean seconds of a token."""
    tokens = variant.loop(
        mx.array(prompt),
        variant.model,
        max_tokens=FIRST + N_TOKENS,
        sampler=variant.make_sampler(**sampling or {}),
        logits_processors=sample_utils.make_logits_processors(**penalties or {}),
    )
    for _ in itertools.islice(tokens, FIRST):
        pass
    start = time.thread_time()
    n_tokens = sum(1 for _ in tokens)
    return (time.thread_time() - start) / max(n_tokens, 1)
