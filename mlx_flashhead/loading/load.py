"""Loads any model of mlx-lm and attaches a FlashHead."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..index.files import FILE_NAME
from ..lossless.policy import policy_of
from ..models.dense import load_dense, load_dense_part
from ..models.fetch import resolve
from ..models.install import get_flash_head
from ..models.locate import find_head
from .attach import attach_fine_head, attach_head
from .sources import BUILD, DENSE, REFUSE, HeadOptions, bundled_head, explicit_head


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    flash_head: str | Path | None = None,
    build: bool = True,
    n_probes: int | None = None,
    backend: str | None = None,
    fine_head: str | Path | bool | None = None,
    head_bits: int | None = None,
    progress: bool = True,
):
    """Loads a model with a FlashHead; takes ``mlx_lm.load``'s arguments and more.

    It takes the given FlashHead, else the one in the model's folder, else the one that was built
    for this model before. Otherwise it builds one and keeps it.

    Args:
        path_or_hf_repo: A local folder or a Hugging Face repository: any model that mlx-lm loads.
        tokenizer_config: Passed to the tokenizer.
        model_config: Overrides of the model's configuration.
        adapter_path: LoRA adapters of the body; an adapted head must be fused first.
        lazy: Load the body's weights when they are first used.
        return_config: Also return the model's configuration.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Allow the repository's own Python code.
        flash_head: A folder or a Hugging Face repository of a FlashHead.
        build: Build a FlashHead if there is none, once, in a few minutes.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        fine_head: Give a quantized model the finer output head of its original: a repository, a
            folder or a safetensors file, or True for the one that the model names. It is fetched
            once. Where that fails, the model keeps its own, with a sentence.
        head_bits: Bits of the finer head: 6, 8 (default) or 16.
        progress: Print steps and bars on standard error.

    Returns:
        ``(model, tokenizer)``, with the configuration as a third item if asked for.

    Raises:
        ValueError: If the model does not exist, if there is no FlashHead and none may be built, if
            it is damaged or belongs to another model, or if an argument is not valid.
    """
    loaded = load_with_head(
        resolve(path_or_hf_repo, revision),
        HeadOptions(
            flash_head,
            BUILD if build else REFUSE,
            n_probes,
            backend,
            progress,
            fine_head=fine_head,
            head_bits=head_bits,
        ),
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        adapter_path=adapter_path,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
    )
    return loaded if return_config else loaded[:2]


def load_with_head(folder: Path, options: HeadOptions, **of_mlx_lm: Any):
    """A folder's model with its FlashHead: ``(model, tokenizer, config)``.

    Takes arguments of ``mlx_lm.load``, and raises as `load`.
    """
    stored = explicit_head(options) or bundled_head(folder, options)
    model, tokenizer, config = load_dense(folder, **of_mlx_lm)
    attach_head(model, tokenizer, stored, folder, options)
    return model, tokenizer, config


def load_dense_head(folder: Path, options: HeadOptions, **of_mlx_lm: Any):
    """A folder's model with its normal (dense) head, or a finer one that the options name."""
    loaded = load_dense(folder, **of_mlx_lm)
    if options.fine_head:
        attach_fine_head(find_head(loaded[0]), folder, options)
    return loaded


def load_draft(
    path_or_hf_repo: str, *, draft_probes: int | None = None, trust_remote_code: bool = False
):
    """Loads a draft model, with its FlashHead if it has one. It builds none.

    The target verifies each draft, so fewer probes cost no exactness. By default a draft reads a
    tenth of its head's bytes (docs/drafts.md).

    Raises:
        ValueError: As in `load`. Also if a number of probes is given without a FlashHead.
    """
    model, tokenizer, _ = load_with_head(
        resolve(path_or_hf_repo),
        HeadOptions(missing=DENSE, n_probes=draft_probes, drafts=True),
        trust_remote_code=trust_remote_code,
    )
    if draft_probes is not None and get_flash_head(model) is None:
        raise ValueError(
            f"{path_or_hf_repo} has no FlashHead, so it drafts without probes: leave "
            "`draft_probes` out."
        )
    return model, tokenizer


def sharded_load(
    path_or_hf_repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    return_config: bool = False,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    flash_head: str | Path | None = None,
    n_probes: int | None = None,
    backend: str | None = None,
    progress: bool = True,
):
    """Loads this process's part of a model: ``mlx_lm.utils.sharded_load`` with a FlashHead.

    Several processes do not build a FlashHead. It is given, in the model's folder, or was built
    before by a single process.

    Args:
        path_or_hf_repo: A folder at the same place on each machine, or a Hugging Face repository.
        pipeline_group: The processes that share the layers out.
        tensor_group: The processes that share each layer. Without either group all processes share
            the model in the way that it supports, tensor first.
        return_config: Also return the model's configuration.
        tokenizer_config: Passed to the tokenizer.
        trust_remote_code: Allow the repository's own Python code.
        flash_head: A folder or a Hugging Face repository of a FlashHead.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        progress: Print steps on standard error.

    Returns:
        ``(model, tokenizer)``, with the configuration as a third item if asked for.

    Raises:
        ValueError: If the model cannot be split in this way, if its head is split over the
            vocabulary, or as in :func:`load`.
    """
    options = HeadOptions(flash_head, REFUSE, n_probes, backend, progress, tunes=False)
    folder = resolve(path_or_hf_repo, files=["*.json", FILE_NAME])
    stored = explicit_head(options) or bundled_head(folder, options)
    model, tokenizer, config = load_dense_part(
        path_or_hf_repo,
        pipeline_group,
        tensor_group,
        tokenizer_config=tokenizer_config,
        trust_remote_code=trust_remote_code,
    )
    head = attach_head(model, tokenizer, stored, folder, options)
    assert head is not None
    policy_of(head).lockstep = True
    return (model, tokenizer, config) if return_config else (model, tokenizer)
