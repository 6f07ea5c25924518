"""Modules of extras: imported on demand, or named with the command that installs them."""

import importlib
from types import ModuleType


def installation(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install 'mlx_flashhead[{extra}]'"


def from_extra(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module that an extra of this package brings.

    Args:
        module: Its dotted name.
        extra: The extra, as pyproject.toml names it.
        what: The feature that needs the module, as the beginning of the sentence.

    Raises:
        ValueError: If it is not installed, naming the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs {error.name}, which is not installed: {installation(extra)}."
        ) from error
