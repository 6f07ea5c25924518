"""What replaces functions of other packages: for a block, or for the rest of the process."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

Wrap = Callable[[Any], Any]  # from what has a name to what gets it


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


def put_in_place(place: str, wrap: Wrap) -> None:
    """Replaces what is at ``place``, such as "mlx_lm.utils.load", and the same object in all
    imported modules of its package."""
    module, _, name = place.rpartition(".")
    original, package = getattr(import_module(module), name), module.split(".")[0]
    replacement = wrap(original)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").split(".")[0] == package:
            for held, value in list(vars(other).items()):
                if value is original:
                    setattr(other, held, replacement)


# Programs that know nothing of FlashHead: other functions take the places of their loads and loops.

# Modules that load a model and do not generate: they convert it, train it, measure its layers.
WITHOUT_TEXT = {
    "mlx_lm": ["cache_prompt", "convert", "fuse", "lora", "quant", "share", "tuner", "upload"],
    "mlx_vlm": ["convert", "lora", "train", "trainer"],
}


def caller_changes_batches() -> bool:
    """Whether the caller is rapid-mlx, which replaces methods within mlx-lm's batches."""
    return sys._getframe(2).f_globals.get("__name__", "").split(".")[0] == "rapid_mlx"


def caller_generates() -> bool:
    """Whether the caller of the present function is none of the modules without text."""
    names = sys._getframe(2).f_globals
    spec = names.get("__spec__")  # a program that runs has another name than its own
    name = spec.name if spec is not None else names.get("__name__", "")
    package, module = f"{name}.".split(".")[:2]
    return module not in WITHOUT_TEXT.get(package, ())


def patch_mlx_lm(load: Wrap, load_model: Wrap, loop: Wrap, batches: Wrap) -> None:
    """Replaces mlx-lm's ``load``, ``load_model``, its loop of each kind and ``BatchGenerator``."""

    def for_programs(original: Any) -> Any:
        wrapped = load_model(original)

        def call(*arguments: Any, **options: Any) -> Any:
            # load and sharded_load put adapters and shards on its model
            by_library = sys._getframe(1).f_globals["__name__"] == "mlx_lm.utils"
            return (original if by_library else wrapped)(*arguments, **options)

        return call

    put_in_place("mlx_lm.utils.load", load)
    put_in_place("mlx_lm.utils.load_model", for_programs)
    for name in ("generate_step", "speculative_generate_step"):
        put_in_place(f"mlx_lm.generate.{name}", loop)
    put_in_place("mlx_lm.generate.BatchGenerator", batches)


def patch_mlx_vlm(load: Wrap, loop: Wrap) -> None:
    """Replaces mlx-vlm's ``load``, and its loop of one text if it is where 0.7 has it."""
    put_in_place("mlx_vlm.utils.load", load)
    with suppress(ImportError):
        put_in_place("mlx_vlm.generate.ar.generate_step", loop)
