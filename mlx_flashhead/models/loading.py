"""Loads dense models with mlx-lm: whole ones and parts, with errors of one sentence."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..index.files import is_companion
from .compat.mlx_lm import load, load_adapters, sharded_load
from .fetch import reason

OTHER_FORMATS = {
    "*.gguf": "a GGUF file",
    "*.bin": "PyTorch's weights",
    "*.pth": "PyTorch's weights",
    "*.pt": "PyTorch's weights",
}
REMEDY = "choose a repository with safetensors, such as one of mlx-community"
# The context of a model whose configuration and tokenizer do not give it.
UNKNOWN_CONTEXT = 32768
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def load_dense(
    folder: Path, *, adapter_path: str | None = None, **kwargs: Any
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Loads a dense model as ``mlx_lm.load`` does.

    Args:
        folder: The model's folder.
        adapter_path: Adapters to put on it.
        kwargs: Other arguments of ``mlx_lm.load``.

    Returns:
        The model, its tokenizer and its configuration.

    Raises:
        ValueError: If mlx-lm cannot load it, in one sentence.
    """
    if is_companion(folder):
        raise ValueError(
            f"{folder} is a FlashHead without its model: give it as `flash_head` of its model."
        )
    check_format(folder)
    try:
        loaded: Any = load(str(folder), return_config=True, **kwargs)
    # Code of models, and of damaged settings, raises any type.
    except Exception as error:
        remedy = "check or fetch it again"
        if not any(folder.glob("*.safetensors")):
            remedy += f", or {REMEDY}"
        if "trust_remote_code" in str(error):
            remedy = "if you trust its code, add `trust_remote_code=True`"
        raise ValueError(
            f"mlx-lm cannot load the model in {folder} ({reason(error)}): {remedy}."
        ) from error
    model, tokenizer, config = loaded
    if adapter_path is not None:
        try:
            model = load_adapters(model, adapter_path)
        except Exception as error:
            raise ValueError(
                f"The adapters in {adapter_path} cannot be put on this model ({reason(error)}): "
                "check `adapter_path`."
            ) from error
        model.eval()
    return model, tokenizer, config


def check_format(folder: Path) -> None:
    """Checks that a folder holds weights in the format that mlx-lm reads.

    Raises:
        ValueError: If it holds a GGUF file, or PyTorch's weights, alone.
    """
    if any(folder.glob("*.safetensors")):
        return
    for pattern, what in OTHER_FORMATS.items():
        file = next(folder.glob(pattern), None)
        if file is not None:
            raise ValueError(
                f"{folder} holds {what} ({file.name}), which mlx-lm does not read: {REMEDY}."
            )


def load_dense_part(
    path_or_hf_repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Loads this process's part of a dense model.

    Every process has the whole head, so each finds the same token by itself.

    Args:
        path_or_hf_repo: The model's folder or repository.
        pipeline_group: Processes that share the layers out.
        tensor_group: Processes that share each layer.
        tokenizer_config: Arguments of the tokenizer.
        trust_remote_code: Allow the repository's own code.

    Returns:
        The model, its tokenizer and its configuration.

    Raises:
        ValueError: If mlx-lm cannot split it between the processes.
    """
    # A repository's name stays as it is.
    source = os.path.expanduser(path_or_hf_repo)
    # mlx-lm's default allows a tokenizer's own code.
    if not tokenizer_config:
        tokenizer_config = {"trust_remote_code": trust_remote_code}
    try:
        loaded: Any = sharded_load(
            source,
            pipeline_group,
            tensor_group,
            return_config=True,
            tokenizer_config=tokenizer_config,
            trust_remote_code=trust_remote_code,
        )
    # Each model has its own shard() with its own errors.
    except Exception as error:
        remedy = "use `pipeline_group`"
        if pipeline_group is not None:
            remedy = "use no `pipeline_group`"
        raise ValueError(
            f"mlx-lm cannot split the model {path_or_hf_repo} between these processes "
            f"({reason(error)}): {remedy}, another number of processes, or one."
        ) from error
    return loaded


def context_of(config: dict[str, Any], tokenizer: Any) -> int:
    """The number of tokens in a model's context.

    Args:
        config: The model's configuration.
        tokenizer: The model's tokenizer, for a configuration that does not give it.
    """
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 1:
                return part[key]
    # Where it is not known transformers writes 1e30.
    length = tokenizer.model_max_length
    if 1 < length <= 2**24:
        return length
    return UNKNOWN_CONTEXT
