"""FlashHead for MLX: faster decoding of small language models, by retrieval in the output layer.

from mlx_flashhead import load, generate
model, tokenizer = load("folder-or-repository")
text = generate(model, tokenizer, prompt="…", max_tokens=100)
"""

from .common.interrupts import end_at_signals, is_a_command

# Signals end a command from the first line on, since imports take seconds.
if is_a_command():
    end_at_signals()

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .conversion.pipeline import convert
    from .decoding.generation import batch_generate, generate, stream_generate
    from .decoding.sampling import make_sampler
    from .head.flash_head import FlashHead
    from .index.flash_head_config import FlashHeadConfig
    from .loading.drafts import load_draft
    from .loading.load import attach, load, sharded_load
    from .models.install import detach, get_flash_head
    from .structured.processor import grammar_processor

__all__ = [
    "FlashHead", "FlashHeadConfig", "__version__", "attach", "batch_generate", "convert", "detach",
    "generate", "get_flash_head", "grammar_processor", "load", "load_draft",
    "make_sampler", "sharded_load", "stream_generate",
]  # fmt: skip

# Imported at first use: mlx-lm takes a second, which `--help` and `--version` do without.
_MODULES = {
    "conversion.pipeline": ("convert",),
    "head.flash_head": ("FlashHead",),
    "index.flash_head_config": ("FlashHeadConfig",),
    "loading.drafts": ("load_draft",),
    "loading.load": ("attach", "load", "sharded_load"),
    "decoding.generation": ("batch_generate", "generate", "stream_generate"),
    "decoding.sampling": ("make_sampler",),
    "models.install": ("detach", "get_flash_head"),
    "structured.processor": ("grammar_processor",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `generate` and `convert` are commands' modules, too. Importing one sets the package's attribute of
# its name: so both are imported now, and the names are the functions' from then on, as in mlx-lm.
# Under `python -m mlx_flashhead.generate`, Python itself is about to run the module.
if sys.argv[:1] != ["-m"]:
    for _name in ("generate", "convert"):
        import_module(f".{_name}", __name__)
        del globals()[_name]
