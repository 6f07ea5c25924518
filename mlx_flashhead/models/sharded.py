"""Loads models in parts: several processes share one. Every process has the same hidden state and
the whole head, so each finds the same token by itself."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from .compat.utils import sharded_load as load_part
from .fetch import reason


def load_dense_part(
    path_or_hf_repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
):
    """This process's part of the dense model, its tokenizer and configuration, or ValueError."""
    folder = Path(path_or_hf_repo).expanduser()
    try:
        model, tokenizer, config = load_part(
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
        processes = (tensor_group or mx.distributed.init()).size()
        by_layers = hasattr(getattr(model, "model", None), "pipeline")
        _check_attention_heads(config, processes, by_layers=by_layers)
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
