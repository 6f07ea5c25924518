"""The loads and the loop of mlx-lm and mlx-vlm in programs that know nothing of FlashHead: other
functions take their places for the rest of the process."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx_lm

from .patching import put_in_place, when_imported

Load = Callable[..., Any]
Wrap = Callable[[Load], Load]

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
    utils = importlib.import_module("mlx_lm.utils")
    original = utils.load_model
    wrapped = load_model(original)

    def for_programs(*arguments: Any, **options: Any) -> Any:
        # load and sharded_load put adapters and shards on its model
        by_library = sys._getframe(1).f_globals is vars(utils)
        return (original if by_library else wrapped)(*arguments, **options)

    generation = importlib.import_module("mlx_lm.generate")
    put_in_place("mlx_lm", mlx_lm, "load", load(mlx_lm.load))
    put_in_place("mlx_lm", utils, "load_model", for_programs)
    for name in ("generate_step", "speculative_generate_step"):
        put_in_place("mlx_lm", generation, name, loop(getattr(generation, name)))
    put_in_place("mlx_lm", generation, "BatchGenerator", batches(generation.BatchGenerator))
    for name, module_name, wrap in (
        ("load", "mlx_vlm.utils", load),
        ("generate_step", "mlx_vlm.generate.ar", vlm_loop),
    ):
        when_imported(module_name, partial(_put, name, wrap))


def _put(name: str, wrap: Wrap, module: Any) -> None:
    put_in_place("mlx_vlm", module, name, wrap(getattr(module, name)))
