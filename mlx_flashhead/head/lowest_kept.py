"""The lowest logit of a row that top-p, min-p and top-k keep, in one kernel.

MLX's partition would sort all logits on a GPU, which takes milliseconds.

The kernel belongs to no head. The whole process uses it once a head on the kernels is installed,
which tries it, and no longer once a head takes MLX's operations.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from .kernel_text import LOWEST_KEPT_BODY, header
from .short_inputs import HELD, held

NAME = "lowest_kept"
_threads = [0]  # of a threadgroup; 0 where the kernel is not used


def use_kernel(threads: int) -> None:
    """Takes the kernel with threadgroups of ``threads`` from now on, or with 0 none."""
    _threads[0] = threads


def kernel_is_used() -> bool:
    """Whether thresholds come from the kernel."""
    return _threads[0] > 0 and mx.metal.is_available()


def lowest_kept(
    logits: mx.array,
    settings: mx.array,
    top_k: mx.array,
    log_total: mx.array | None,
    threads: int | None = None,
) -> mx.array:
    """The lowest logit that the filters keep: (R, K) float32 → (R, 1).

    Args:
        logits: Of R rows.
        settings: (R, 3) float32 or longer, as `Draws` has them.
        top_k: (R,) uint32 or longer.
        log_total: (R, 1), the log of the mass of all tokens; None without top-p.
        threads: Of a threadgroup; None: as :func:`use_kernel` has set.
    """
    threads = _threads[0] if threads is None else threads
    total = mx.zeros(max(len(logits), HELD)) if log_total is None else log_total.reshape(-1)
    (kept,) = _kernel(threads, mx.fast.metal_kernel)(
        inputs=[logits.astype(mx.float32), held(settings), held(top_k), held(total)],
        grid=(threads, len(logits), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(len(logits), 1)],
        output_dtypes=[mx.float32],
    )
    return kept


@cache
def _kernel(threads: int, metal_kernel: Callable[..., Any]) -> Callable[..., list[mx.array]]:
    kernel: Callable[..., list[mx.array]] = metal_kernel(
        name=f"flash_head_{NAME}",
        input_names=["logits", "settings", "top_k", "log_total"],
        output_names=["kept"],
        header=header("histogram", "noise", "sample", row_threads=threads),
        source=LOWEST_KEPT_BODY,
    )
    return kernel
