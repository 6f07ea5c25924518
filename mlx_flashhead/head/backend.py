"""Which path a head takes: its Metal kernels, or plain MLX operations."""

import logging
import os

import mlx.core as mx

from .clustered import ClusteredRows
from .kernels import MetalSteps
from .portable import PortableSteps
from .self_check import find_trouble

METAL, PORTABLE = "metal", "mlx"
BACKENDS = (METAL, PORTABLE)
BACKEND_VARIABLE = "MLX_FLASHHEAD_BACKEND"
HOW_TO_REPORT = (
    "please report this as an issue, with the output of "
    "`mlx_flashhead.benchmark head --shape 32000,1024 --report`"
)

log = logging.getLogger("mlx_flashhead")


def gpu_is_default() -> bool:
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def named_backend(asked: str | None) -> str | None:
    """The path asked for by name: ``asked``, else the environment's; None without a name."""
    return asked or os.environ.get(BACKEND_VARIABLE) or None


def choose_backend(asked: str | None = None) -> str:
    """The path to take: the one asked for by name, else Metal if MLX computes on an Apple GPU.
    ValueError if the name is unknown, or this machine has no Metal."""
    name = named_backend(asked)
    if name is None:
        return METAL if gpu_is_default() else PORTABLE
    if name not in BACKENDS:
        raise ValueError(f"Unknown FlashHead backend {name!r}: choose {' or '.join(BACKENDS)}.")
    if name == METAL and not mx.metal.is_available():
        raise ValueError(
            "The FlashHead backend 'metal' needs an Apple GPU and this machine has none: "
            f"use backend='mlx' or unset {BACKEND_VARIABLE}."
        )
    return name


def make_steps(clustered: ClusteredRows, asked: str | None) -> tuple[PortableSteps, str]:
    """The steps of the chosen path, and a sentence: the reason for it, or its slower part."""
    if choose_backend(asked) == PORTABLE:
        reason = "MLX finds no Apple GPU on this machine."
        if named_backend(asked) is not None:
            reason = "The backend 'mlx' was asked for."
        elif mx.metal.is_available():
            reason = "MLX's default device is the CPU."
        return PortableSteps(clustered), reason
    steps = MetalSteps(clustered)
    if not steps.unsupported_formats:
        return steps, "MLX computes on an Apple GPU."
    what = {"route": "centroids", "score": "rows"}
    said = " and ".join(f"{form} {what[step]}" for step, form in steps.unsupported_formats.items())
    reason = (
        f"FlashHead's Metal kernels do not read {said}: MLX's own operations do, which takes a "
        "few more kernels per token. The other steps are FlashHead's."
    )
    log.warning(reason)
    return steps, reason


def checked(
    steps: PortableSteps, reason: str, asked: str | None, dtype: mx.Dtype, n_probes: int
) -> tuple[PortableSteps, str]:
    """What :func:`make_steps` gave, after each kernel has been built and run once; portable if one
    fails, or ValueError if "metal" was asked for by name."""
    trouble = find_trouble(steps, dtype, n_probes) if isinstance(steps, MetalSteps) else None
    if trouble is None:
        return steps, reason
    if named_backend(asked) == METAL:
        raise ValueError(
            f"FlashHead's Metal kernels cannot be used: {trouble}; use backend='mlx' or unset "
            f"{BACKEND_VARIABLE}, and {HOW_TO_REPORT}."
        )
    reason = (
        f"FlashHead takes MLX's own operations instead of its Metal kernels, because {trouble}; "
        f"{HOW_TO_REPORT}."
    )
    log.warning(reason)
    return PortableSteps(steps.clustered), reason
