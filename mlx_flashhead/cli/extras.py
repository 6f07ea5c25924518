"""Modules that a plain installation may lack: imported where they are needed, or named."""

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
        what: What needs the module, as the sentence begins.

    Raises:
        ValueError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs {error.name}, which is not installed: {installation(extra)}."
        ) from error
