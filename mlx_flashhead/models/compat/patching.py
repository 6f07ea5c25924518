"""What replaces functions of other packages: for a block, or for the rest of the process."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@contextmanager
def replaced(owner: Any, **names: Any) -> Iterator[None]:
    """Within the block, globals of a module or attributes of an object have other values."""
    own = {name: vars(owner)[name] for name in names if name in vars(owner)}
    try:
        for name, value in names.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in names:
            if name in own:
                setattr(owner, name, own[name])
            else:  # a class's parent has it
                delattr(owner, name)


def put_in_place(package: str, module: ModuleType, name: str, replacement: Any) -> None:
    """Replaces a name of ``module``, and the same object in all imported modules of ``package``."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").split(".")[0] == package:
            for held, value in list(vars(other).items()):
                if value is original:
                    setattr(other, held, replacement)


def when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls ``then`` with a module: now if it is imported already, else as soon as it is."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, then))


class _Watch:
    """A finder that finds one module as Python does, and has a look at it afterwards."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec = next((one for one in found if one is not None), None)  # others may watch it too
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self._then(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
