"""Which backend a head takes: plain MLX operations, or Metal kernels; and what machine this is."""

import logging
import os
import platform
import sys
from typing import Any

import mlx.core as mx

METAL = "metal"
PORTABLE = "mlx"
BACKEND_VARIABLE = "MLX_FLASHHEAD_BACKEND"

log = logging.getLogger("mlx_flashhead")


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
        if gpu_is_default():
            return METAL
        return PORTABLE
    if name not in (METAL, PORTABLE):
        raise ValueError(f"Unknown FlashHead backend {name!r}: choose {METAL} or {PORTABLE}.")
    if name == METAL and not mx.metal.is_available():
        raise ValueError(
            "The FlashHead backend 'metal' needs an Apple GPU and this machine has none: "
            f"use backend='mlx' or unset {BACKEND_VARIABLE}."
        )
    return name
