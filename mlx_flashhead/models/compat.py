"""The names of mlx-lm that may move from one version to the next.

Other modules import ``mlx_lm`` itself and its samplers (``mlx_lm.sample_utils``) directly. Every
other name of mlx-lm comes through here. `tests/models/test_compat.py` reports the names that a
version of mlx-lm has renamed or changed, and their users here.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mlx_lm.chat import setup_arg_parser as chat_parser
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, configure_parser, mixed_quant_predicate_builder
from mlx_lm.generate import (
    BatchGenerator,
    BatchResponse,
    GenerationResponse,
    TextStateMachine,
    generate_step,
    make_text_state_machine,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import (
    DEFAULT_ALLOW_PATTERNS,
    dequantize_model,
    maybe_set_recommended_wired_limit,
    quantize_model,
    save,
    sharded_load,
)
from mlx_lm.utils import _download as download

__all__ = [
    "DEFAULT_ALLOW_PATTERNS",
    "MODEL_CONVERSION_DTYPES",
    "BatchGenerator",
    "BatchResponse",
    "GenerationResponse",
    "KVCache",
    "LRUPromptCache",
    "TextStateMachine",
    "can_trim_prompt_cache",
    "chat_parser",
    "configure_parser",
    "dequantize_model",
    "download",
    "evaluate_module",
    "generate_module",
    "generate_step",
    "load_prompt_cache",
    "make_logits_processors",
    "make_prompt_cache",
    "make_text_state_machine",
    "maybe_quantize_kv_cache",
    "maybe_set_recommended_wired_limit",
    "mixed_quant_predicate_builder",
    "quantize_model",
    "replaced",
    "save",
    "sharded_load",
    "speculative_generate_step",
    "trim_prompt_cache",
]

# The attribute mlx_lm.generate is the function, so the module is imported by name.
generate_module = importlib.import_module("mlx_lm.generate")


def evaluate_module() -> ModuleType:
    """``mlx_lm.evaluate``, imported only when asked for.

    Raises:
        ModuleNotFoundError: If lm-eval is not installed.
    """
    return importlib.import_module("mlx_lm.evaluate")


@contextmanager
def replaced(owner: Any, **names: Any) -> Iterator[None]:
    """Within the block, globals of a module or attributes of an object have other values.

    Args:
        owner: The module or the object.
        **names: The values, by name.
    """
    originals = {name: getattr(owner, name) for name in names}
    try:
        for name, value in names.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)
