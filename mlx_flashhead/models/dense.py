"""Loads dense models by mlx-lm, with its errors as one sentence."""

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..index.files import is_companion
from .compat.utils import load, load_adapters
from .fetch import reason


def load_dense(folder: Path, *, adapter_path: str | None = None, **kwargs: Any):
    """``mlx_lm.load`` of a local folder: the dense model, its tokenizer and its configuration;
    ValueError, in one sentence, if mlx-lm cannot load it."""
    if is_companion(folder):
        raise ValueError(
            f"{folder} is a FlashHead without its model: give it as `flash_head`, and the model "
            "it was made for in its place."
        )
    try:
        loaded: Any = load(str(folder), return_config=True, **kwargs)
    except SystemExit as error:
        if error.code != 1:  # the user ended the program
            raise
        # mlx-lm's code of some architectures exits where a package is missing
        raise ValueError(
            f"mlx-lm cannot load the model in {folder}, for the reason printed above: install the "
            "missing package, or use another model."
        ) from error
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        remedy = "check or fetch it again"
        if "trust_remote_code" in str(error):
            remedy = "if you trust its code, add `trust_remote_code=True`"
        elif "number of bits" in str(error):  # mlx before 0.32 has no rows of 1 bit
            remedy = "update mlx, or use another form of the model"
        raise ValueError(
            f"mlx-lm cannot load the model in {folder} ({reason(error)}): {remedy}."
        ) from error
    model, tokenizer, config = loaded
    if adapter_path is not None:
        model = _adapted(model, adapter_path)
    return model, tokenizer, config


def _adapted(model: nn.Module, adapter_path: str) -> nn.Module:
    """The model with LoRA adapters, as ``mlx_lm.load`` puts them on it."""
    try:
        model = load_adapters(model, adapter_path)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The adapters in {adapter_path} cannot be put on this model ({reason(error)}): check "
            "`adapter_path`."
        ) from error
    model.eval()
    return model
