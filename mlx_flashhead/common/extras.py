"""Modules of extras: imported on demand, or named with the command that installs them."""

import importlib
from types import ModuleType


def installation(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install 'mlx_flashhead[{extra}]'"


def from_extra(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module that an extra of this package brings.

    Raises:
        ValueError: If it is not installed: ``what`` needs it, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs {error.name}, which is not installed: {installation(extra)}."
        ) from error
