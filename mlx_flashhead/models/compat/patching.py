"""What replaces functions of other packages: for a block, or for the rest of the process."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# From what has a name to what gets it.
Wrap = Callable[[Any], Any]


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


def put_in_place(name: str, wrap: Wrap, module: ModuleType) -> None:
    """Replaces a name of ``module``, and the same object in all imported modules of its package."""
    original, package = getattr(module, name), module.__name__.split(".")[0]
    replacement = wrap(original)
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


# Programs that know nothing of FlashHead: other functions take the places of their loads and loops.

# Modules that load a model and do not generate: they convert it, train it, measure its layers.
WITHOUT_TEXT = {
    "mlx_lm": ["cache_prompt", "convert", "fuse", "lora", "quant", "share", "tuner", "upload"],
    "mlx_vlm": ["convert", "lora", "train", "trainer"],
}
# Packages that replace methods within mlx-lm's batches, which leaves no room for others.
CHANGES_BATCHES = ("rapid_mlx",)


def caller_changes_batches() -> bool:
    """Whether the module that makes a batch, by the present function, is of one of those above."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.split(".")[0] in CHANGES_BATCHES


def caller_generates() -> bool:
    """Whether the module that has called the present function is none of those above."""
    names = sys._getframe(2).f_globals
    spec = names.get("__spec__")  # a program that runs has another name than its own
    name = spec.name if spec is not None else names.get("__name__", "")
    package, module = f"{name}.".split(".")[:2]
    return module not in WITHOUT_TEXT.get(package, ())


def patch_programs(load: Wrap, load_model: Wrap, loop: Wrap, batches: Wrap, vlm_loop: Wrap) -> None:
    """Replaces ``load`` of both libraries, mlx-lm's ``load_model``, its ``loop`` of each kind, its
    ``BatchGenerator`` and mlx-vlm's loop by what is made of them, those of mlx-vlm as soon as it is
    imported."""
    import mlx_lm

    utils = importlib.import_module("mlx_lm.utils")

    def for_programs(original: Any) -> Any:
        wrapped = load_model(original)

        def call(*arguments: Any, **options: Any) -> Any:
            # load and sharded_load put adapters and shards on its model
            by_library = sys._getframe(1).f_globals is vars(utils)
            return (original if by_library else wrapped)(*arguments, **options)

        return call

    generation = importlib.import_module("mlx_lm.generate")
    put_in_place("load", load, mlx_lm)
    put_in_place("load_model", for_programs, utils)
    for name in ("generate_step", "speculative_generate_step"):
        put_in_place(name, loop, generation)
    put_in_place("BatchGenerator", batches, generation)
    when_imported("mlx_vlm.utils", partial(put_in_place, "load", load))
    when_imported("mlx_vlm.generate.ar", partial(put_in_place, "generate_step", vlm_loop))
