"""Which names of mlx-lm and mlx-vlm get another function under `mlx_flashhead.run`."""

import sys
from contextlib import suppress
from typing import Any

from .replace import Wrap, put_in_place

# Modules that load a model and do not generate: they convert it, train it, measure its layers.
WITHOUT_TEXT = {
    "mlx_lm": ["cache_prompt", "convert", "fuse", "lora", "quant", "share", "tuner", "upload"],
    "mlx_vlm": ["convert", "lora", "train", "trainer"],
}


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
