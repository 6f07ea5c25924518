"""What the trials of wide steps have found on this machine, stored beside the speeds.

A file belongs to a model as it is loaded: its parts, their code, and a sample of its arrays. With
another version of a package or of macOS, or on another machine, the trial runs anew; also where the
machine was busy and is not any more.
"""

import os
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common.machine import system
from ..head.backend import device_name
from ..models.compat.recognised import digest
from ..models.fetch import SPEEDS, home
from ..version import __version__

# Modules besides those of a model's parts: what a version stands for may change while it is made.
CODE = (
    "mlx_lm.models.base",
    "mlx_lm.models.cache",
    *(f"{__package__}.{name}" for name in ("positions", "states", "step", "stand_ins", "twin")),
)
# So many values of each array are read.
N_SAMPLED = 8


def path_of(model: nn.Module) -> Path | None:
    """The file of a model; None where nothing is stored. Evaluates a few values."""
    if os.environ.get("MLX_FLASHHEAD_TUNING") == "off":
        return None
    return home() / SPEEDS / f"{_fingerprint(model)[:24]}.json"


def key_of(layout: str) -> str:
    """What the bits and the times depend on besides the model, in words: its key in the file.

    Args:
        layout: That of the caches, of :func:`layout_of`.
    """
    versions = f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, mlx-flashhead {__version__}"
    device = f"{device_name()}, {mx.default_device().type.name}, {system()}"
    return f"{device}, {versions}: {layout}"


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over a model's parts, their settings and code, and samples of its arrays."""
    found = sha256()
    code = set(CODE)
    for name, part in model.named_modules():
        cls = type(part)
        modules = {base.__module__ for base in cls.__mro__}
        code |= {module for module in modules if module.startswith("mlx_lm.")}
        held: Any = vars(part)
        settings = {key: held[key] for key in held if isinstance(held[key], str | int | float)}
        found.update(f"{name} {cls.__qualname__} {sorted(settings.items())};".encode())
    for name in sorted(code):
        text = digest(sys.modules[name])
        found.update(text.encode())
    arrays: Any = tree_flatten(model.parameters())
    named = {name: array for name, array in arrays if array is not None}
    samples = {name: array.reshape(-1)[:N_SAMPLED].view(mx.uint8) for name, array in named.items()}
    mx.eval(samples)
    for name, array in named.items():
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(bytes(samples[name]))
    return found.hexdigest()
