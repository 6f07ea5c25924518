"""FlashHead for MLX: faster decoding of small language models, by retrieval in the output layer.

from mlx_flashhead import load, generate
model, tokenizer = load("folder-or-repository")
text = generate(model, tokenizer, prompt="…", max_tokens=100)
"""

import sys
from types import ModuleType

from .common.command import end_at_interrupt

end_at_interrupt()  # before the imports below, which take seconds

from .conversion.pipeline import convert
from .head.flash_head import FlashHead
from .index.settings import FlashHeadConfig
from .loading.attach import attach
from .loading.load import load, sharded_load
from .lossless.generation import batch_generate, generate, stream_generate
from .lossless.sampler import make_sampler
from .models.install import detach, get_flash_head
from .structured.processor import grammar_processor
from .version import __version__

__all__ = [
    "FlashHead",
    "FlashHeadConfig",
    "__version__",
    "attach",
    "batch_generate",
    "convert",
    "detach",
    "generate",
    "get_flash_head",
    "grammar_processor",
    "load",
    "make_sampler",
    "sharded_load",
    "stream_generate",
]


class _Package(ModuleType):
    """Keeps ``generate`` and ``convert`` when the commands' modules of these names are imported."""

    def __setattr__(self, name, value):
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
