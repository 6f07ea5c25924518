"""Tiny models of every architecture that mlx-lm has, and what FlashHead says to their heads."""

import importlib
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm import models

from architecture_configs import COMMON, OVERRIDES, VOCAB_SIZE
from mlx_flashhead.conversion.options import ConvertOptions
from mlx_flashhead.conversion.precision import set_bits
from mlx_flashhead.models.compat.mlx_lm import quantize_model
from mlx_flashhead.models.locate import find_head

TYING_FLAGS = ("tie_word_embeddings", "share_input_output_layers", "weight_tying")


def architectures() -> list[str]:
    """The names of mlx-lm's architectures, found without importing them."""
    files = [path for folder in models.__path__ for path in Path(folder).glob("*.py")]
    defines = re.compile(r"^class ModelArgs\b|^from .+ import .*\bModelArgs\b", re.MULTILINE)
    return sorted(path.stem for path in files if defines.search(path.read_text(encoding="utf-8")))


def tiny_architecture(name: str, *, tied: bool, seed: int = 0, **changes) -> nn.Module:
    """A random float32 model of a few layers, not evaluated; some do not care for ``tied``.

    ``changes`` are other values of its configuration.

    Raises:
        ImportError: If mlx-lm cannot import the architecture here.
    """
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            architecture = importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit:
        raise ImportError(printed.getvalue().strip()) from None
    mx.random.seed(seed)
    own = OVERRIDES.get(name, {})
    if callable(own):
        own = own(tied)
    config = COMMON | dict.fromkeys(TYING_FLAGS, tied) | {"model_type": name} | own
    config |= changes
    known = architecture.ModelArgs.__dataclass_fields__
    whole = config | {"text_config": config}
    config = {key: value for key, value in whole.items() if key in known}
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    # Some drop their head when the checkpoint has none, whatever is configured.
    if tied:
        for module in model.modules():
            if type(module).__module__.endswith((".gemma3_text", ".recurrent_gemma")):
                getattr(module, "sanitize", dict)({})
    # It writes to tokens that lie beyond a small vocabulary.
    if name == "phi3small":
        model._dummy_tokenizer_ids = mx.array([VOCAB_SIZE - 3, VOCAB_SIZE - 1])
    model.eval()
    return stirred(model)


def quantized(model: nn.Module) -> nn.Module:
    """The model as ``mlx_lm.convert -q`` quantizes it, to 4 bits but for what it says itself."""
    with redirect_stdout(StringIO()):
        # Its fused layers do not take mlx-lm's own arguments.
        if model.model_type == "afm7":
            options = ConvertOptions("model", head_bits=4)
            return set_bits(model, {}, find_head(model), options)[0]
        return quantize_model(model, {}, 64, 4)[0]


def stirred(model: nn.Module) -> nn.Module:
    """Random values in place of those that start as zeros or ones, such as biases and scales."""

    def stir(path: str, array: mx.array) -> mx.array:
        # These are packed weights.
        if array.dtype in (mx.uint8, mx.uint32):
            return mx.random.randint(0, 2**31 - 1, array.shape).astype(array.dtype)
        if not mx.issubdtype(array.dtype, mx.floating) or path.endswith(".signs"):
            return array
        return array + 0.05 * mx.random.normal(array.shape, dtype=array.dtype)

    model.update(tree_map_with_path(stir, model.parameters()))
    model.eval()
    return model
