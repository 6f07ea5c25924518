"""Which path a head takes: plain MLX operations, or Metal kernels.

Kernels are first tried beside the operations at their real shapes.
"""

import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from .clustered import ClusteredRows, in_token_order
from .kernel_inputs import MIN_PROBES
from .kernels import FEWER_THREADS
from .logit_map import IDENTITY, LogitMap
from .matrix import Matrix
from .metal_steps import MetalSteps
from .proposal import Selection
from .steps import PortableSteps
from .trial import TOO_MANY_THREADS, find_trouble

METAL = "metal"
PORTABLE = "mlx"
BACKEND_VARIABLE = "MLX_FLASHHEAD_BACKEND"
COMMAND = "mlx_flashhead.benchmark head --shape 32000,1024 --report"
HOW_TO_REPORT = f"please report this as an issue, with the output of `{COMMAND}`"

log = logging.getLogger("mlx_flashhead")

N_STATES = 3  # whose logits are compared, at least: in float32 most logits show another order
# Of a million logits in 16 bits some forty or more show another order of sums, of 24,000 perhaps
# none. A vocabulary below ENOUGH_LOGITS / MOST_STATES has fewer.
ENOUGH_LOGITS = 1_000_000
MOST_STATES = 128
SCORED_AT_ONCE = 1024  # clusters, of which a CPU makes a copy


def gpu_is_default() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def numpy_is_faster() -> bool:
    """Whether MLX computes on a CPU without Apple's Accelerate."""
    return mx.default_device().type == mx.cpu and sys.platform != "darwin"


def device_name() -> str:
    """The machine that computes, in words."""
    known: dict[str, Any] = mx.device_info()
    return known.get("device_name") or platform.processor() or platform.machine()


def named_backend(requested: str | None) -> str | None:
    """The path requested by name: ``requested``, else the environment's; None without a name."""
    return requested or os.environ.get(BACKEND_VARIABLE) or None


def choose_backend(requested: str | None = None) -> str:
    """Returns the path to take.

    Args:
        requested: The name of a path; None takes Metal if MLX computes on an Apple GPU.

    Raises:
        ValueError: If the name is unknown, or this machine has no Metal.
    """
    name = named_backend(requested)
    if name is None:
        return METAL if gpu_is_default() else PORTABLE
    if name not in (METAL, PORTABLE):
        raise ValueError(f"Unknown FlashHead backend {name!r}: choose {METAL} or {PORTABLE}.")
    if name == METAL and not mx.metal.is_available():
        raise ValueError(
            "The FlashHead backend 'metal' needs an Apple GPU and this machine has none: "
            f"use backend='mlx' or unset {BACKEND_VARIABLE}."
        )
    return name


def make_steps(clustered: ClusteredRows, requested: str | None) -> tuple[PortableSteps, str]:
    """The steps of the chosen path, and a sentence: the reason for it, or its slower part."""
    if choose_backend(requested) == PORTABLE:
        reason = "MLX finds no Apple GPU on this machine."
        if named_backend(requested) is not None:
            reason = "The backend 'mlx' was requested."
        elif mx.metal.is_available():
            reason = "MLX's default device is the CPU."
        return PortableSteps(clustered), reason
    steps = MetalSteps(clustered)
    if steps.reads_rows:
        return steps, "MLX computes on an Apple GPU."
    reason = (
        f"FlashHead's Metal kernels do not read {clustered.rows.format} rows: MLX's own operations "
        "do, which takes a few more kernels per token. The other steps are FlashHead's."
    )
    log.warning(reason)
    return steps, reason


def check_kernels(
    steps: PortableSteps, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap = IDENTITY
) -> tuple[PortableSteps, str | None]:
    """Runs each kernel once, with smaller threadgroups if its pipeline allows no others.

    Args:
        steps: What :func:`make_steps` has chosen.
        dtype: Of the hidden states.
        n_probes: Clusters that are scored.
        logit_map: What the model does to its head's logits.

    Returns:
        The steps; and what the trouble is if a kernel fails, as a part of a sentence.
    """
    if not isinstance(steps, MetalSteps):
        return steps, None
    trouble = find_trouble(steps, dtype, n_probes, logit_map)
    if trouble and TOO_MANY_THREADS in trouble and steps.row_threads > FEWER_THREADS:
        steps = MetalSteps(steps.clustered, steps.metal_kernel, FEWER_THREADS)
        # a second trial of a map comes after one without it, whose kernels are others now
        for tried in dict.fromkeys((IDENTITY, logit_map)):
            trouble = find_trouble(steps, dtype, n_probes, tried)
            if trouble is not None:
                break
    if trouble is None:
        # those of M1 and M2: a matrix product takes 1.8 times as long (ml-explore/mlx, number 4216)
        emulating = "applegpu_g1[34]"
        if dtype == mx.bfloat16 and re.match(emulating, str(mx.device_info().get("architecture"))):
            steps.float16_rows = steps.clustered.flat_rows().in_float16()
    return steps, trouble


def logits_of_scores(steps: PortableSteps, hidden: mx.array) -> mx.array:
    """Logits of all tokens as the step that scores clusters gives them: (1, D) → (1, V)."""
    clustered = steps.clustered
    n_clusters = clustered.n_clusters
    size = min(n_clusters, SCORED_AT_ONCE)
    parts = []
    for start in range(0, n_clusters, size):
        first = min(start, n_clusters - size)
        # fewer than MIN_PROBES would need another kernel
        clusters = mx.arange(first, first + max(size, MIN_PROBES), dtype=mx.uint32)
        selection = Selection(mx.minimum(clusters, n_clusters - 1)[None])
        parts.append(steps.score(hidden, selection).logits[:, start - first : size])
    slots = mx.concatenate(parts, axis=1).reshape(1, -1)
    return in_token_order(slots, clustered.slot_of)


def n_compared(vocab_size: int, dtype: mx.Dtype) -> int:
    """The number of states whose logits of ``dtype`` are compared: in 16 bits ENOUGH_LOGITS."""
    if dtype == mx.float32:
        return N_STATES
    return max(N_STATES, min(-(-ENOUGH_LOGITS // vocab_size), MOST_STATES))


def shows_other_sums(vocab_size: int, dtype: mx.Dtype) -> bool:
    """Whether so many logits of ``dtype`` would show that they are sums in another order."""
    return dtype == mx.float32 or n_compared(vocab_size, dtype) * vocab_size >= ENOUGH_LOGITS


def compared_states(rows: Matrix, vocab_size: int, dtype: mx.Dtype) -> list[mx.array]:
    """Hidden states (1, D) of ``dtype`` on which products with the rows are compared."""
    return [
        mx.random.normal((1, rows.hidden_size), key=mx.random.key(seed)).astype(dtype)
        for seed in range(n_compared(vocab_size, rows.logits_dtype(dtype)))
    ]


def scores_agree(
    steps: PortableSteps, dense_logits: Callable[[mx.array], mx.array], dtype: mx.Dtype
) -> float:
    """Returns the share of logits that scoring gives like the product with one state.

    They must agree to the last bit. Evaluates.

    Args:
        steps: What scores.
        dense_logits: Gives the logits (1, V) of a state (1, D).
        dtype: Of the states.
    """
    clustered = steps.clustered
    states = compared_states(clustered.rows, clustered.vocab_size, dtype)
    n_same = 0
    for hidden in states:
        same = logits_of_scores(steps, hidden) == dense_logits(hidden)
        n_same += cast(int, mx.sum(same).item())
    return n_same / (len(states) * clustered.vocab_size)
