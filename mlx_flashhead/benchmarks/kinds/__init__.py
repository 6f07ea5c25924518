"""The kinds of `mlx_flashhead.benchmark`, each named like its file: its docstring is its help.

It has an ``add_arguments(parser)`` and a ``run(args)``. `..report` runs its rounds.
"""

import pkgutil
from importlib import import_module
from types import ModuleType


def kinds() -> dict[str, ModuleType]:
    """All kinds by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}") for name in names}
