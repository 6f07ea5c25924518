"""Loads dense models by mlx-lm, whole or in parts, with its errors as one sentence."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..index.files import is_companion
from .compat.mlx_lm import load, load_adapters, sharded_load
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
    except Exception as error:  # code of models, and of damaged settings, raises any type
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
        try:
            model = load_adapters(model, adapter_path)
        except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The adapters in {adapter_path} cannot be put on this model ({reason(error)}): "
                "check `adapter_path`."
            ) from error
        model.eval()
    return model, tokenizer, config


def load_dense_part(
    path_or_hf_repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
):
    """This process's part of the dense model, its tokenizer and configuration, or ValueError. Every
    process has the same hidden state and the whole head, so each finds the same token by itself."""
    folder = Path(path_or_hf_repo).expanduser()
    try:
        model, tokenizer, config = sharded_load(
            # mlx-lm downloads only this part's files of a repository
            str(folder) if folder.is_dir() else path_or_hf_repo,
            pipeline_group,
            tensor_group,
            return_config=True,
            # mlx-lm's default allows a tokenizer's own code
            tokenizer_config=tokenizer_config or {"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # each model has its own shard() with its own errors
        no = "" if pipeline_group is None else "no "
        raise ValueError(
            f"mlx-lm cannot split the model {path_or_hf_repo} between these processes "
            f"({reason(error)}): use {no}`pipeline_group`, another number of "
            "processes, or one."
        ) from error
    if pipeline_group is None and hasattr(model, "shard"):
        by_layers = hasattr(getattr(model, "model", None), "pipeline")
        size = (tensor_group or mx.distributed.init()).size()
        _check_attention_heads(config, size, by_layers=by_layers)
    return model, tokenizer, config


def _check_attention_heads(config: dict, processes: int, *, by_layers: bool) -> None:
    """Raises if the attention heads cannot be shared out. mlx-lm rounds down and makes garbage."""
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads", heads)
    if not isinstance(heads, int) or not isinstance(groups, int):
        return
    # some models repeat their key-value heads if there are fewer of them than processes
    if heads % processes or (groups % processes and processes % groups):
        instead = "`pipeline_group`" if by_layers else "one"
        raise ValueError(
            f"The model's {heads} attention heads ({groups} of keys and values) cannot be shared "
            f"out to {processes} processes: use {instead}, or a number of processes that divides "
            "both."
        )
