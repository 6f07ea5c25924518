"""A model that several processes share, as ``mlx.launch`` starts them: each has a part of it."""

import secrets
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_lm import generation_stream
from ..models.loading import load_dense_part
from .head_options import HeadOptions
from .load import sharded_load


def load_part(
    processes: mx.distributed.Group,
    path_or_hf_repo: str,
    options: HeadOptions,
    *,
    dense: bool = False,
    by_layers: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Loads this process's part of a model.

    Args:
        processes: Those that share it.
        path_or_hf_repo: The model's folder or repository.
        options: Name its FlashHead and the number of probes.
        dense: Whether it keeps its normal (dense) head.
        by_layers: Whether each process has some layers, instead of a part of every layer.
        tokenizer_config: Arguments of the tokenizer.
        trust_remote_code: Run the model's own Python code.

    Returns:
        The model, its tokenizer and its configuration.

    Raises:
        ValueError: If the model does not exist or cannot be split in this way, or has no FlashHead.
    """
    group = None
    if by_layers:
        group = processes
    if dense:
        return load_dense_part(
            path_or_hf_repo,
            group,
            tokenizer_config=tokenizer_config,
            trust_remote_code=trust_remote_code,
        )
    return sharded_load(
        path_or_hf_repo,
        group,
        return_config=True,
        tokenizer_config=tokenizer_config,
        trust_remote_code=trust_remote_code,
        flash_head=options.flash_head,
        n_probes=options.n_probes,
    )


def seed_for_all(processes: mx.distributed.Group, seed: int | None) -> None:
    """Seeds MLX's random state alike in all processes: each samples every token.

    Args:
        processes: Those that share a model.
        seed: The user's; None: one is drawn, and all processes add theirs up.
    """
    if seed is None:
        drawn = mx.array(secrets.randbits(24))
        seed = cast(int, mx.distributed.all_sum(drawn, group=processes, stream=mx.cpu).item())
    mx.random.seed(seed)


def wait_for_all(processes: mx.distributed.Group) -> None:
    """Waits until all processes have come to this call.

    The loop computes a token ahead, for which each process needs the others.
    """
    mx.synchronize(generation_stream)
    mx.eval(mx.distributed.all_sum(mx.array(1), group=processes, stream=mx.cpu))
