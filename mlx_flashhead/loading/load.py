"""Loads any model with a FlashHead, or attaches one to a model in memory."""

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..decoding.policy import policy_of
from ..head.flash_head import FlashHead
from ..index.files import FILE_NAME
from ..models.errors import UnsupportedHeadError
from ..models.fetch import resolve
from ..models.finer_head import check_is_coarse, give_fine_head
from ..models.install import get_flash_head
from ..models.loading import load_dense, load_dense_part
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..models.origin import local_origin
from . import sources
from .builds import Build
from .head_options import BUILD, DENSE, LATER, REFUSE, HeadOptions
from .installing import install_stored
from .sources import StoredHead


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
    flash_head_always: bool = False,
    progress: bool = True,
) -> tuple[Any, ...]:
    """Loads a model with a FlashHead: ``mlx_lm.load`` with further arguments.

    It is the one that is named, else the one in the model's folder, else the one that was built
    for this model before, else a new one, which is cached.

    Args:
        path_or_hf_repo: Folder or Hugging Face repository of the model.
        tokenizer_config: Arguments of the tokenizer.
        model_config: Entries that replace those of the model's configuration.
        adapter_path: LoRA adapters of the body; an adapted head must be fused first.
        lazy: Leave the weights on the disk until they are needed.
        return_config: Whether the configuration is wanted, too.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run the model's own Python code.
        flash_head: A folder or a Hugging Face repository of a FlashHead.
        build: Build a FlashHead if there is none, once.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        fine_head: Give a quantized model the finer output head of its original: a repository, a
            folder or a safetensors file, or True for the one that the model names. Where that
            cannot be had, the model keeps its own, with a sentence.
        head_bits: Bits of the finer head: 6, 8 (default) or 16.
        flash_head_always: Use the FlashHead even where it makes this model no faster here.
        progress: Print what is done, and bars, on standard error.

    Returns:
        ``(model, tokenizer)``, and the configuration if ``return_config``.

    Raises:
        ValueError: If the model does not exist, if there is no FlashHead and none may be built, if
            it is damaged or belongs to another model, if the source of a finer head is named and
            cannot be used, or if an argument is not valid.
    """
    options = HeadOptions(
        flash_head=flash_head,
        missing=_where_missing(build),
        n_probes=n_probes,
        backend=backend,
        progress=progress,
        always=flash_head_always,
        fine_head=fine_head,
        head_bits=head_bits,
    )
    loaded = load_with_head(
        resolve(path_or_hf_repo, revision),
        options,
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        adapter_path=adapter_path,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
    )
    if return_config:
        return loaded
    return loaded[:2]


def _where_missing(build: bool) -> str:
    """What is to be done without a FlashHead, as a caller of Python chooses."""
    if build:
        return BUILD
    return REFUSE


def load_with_head(
    folder: Path, options: HeadOptions, **loading: Any
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Loads a folder's model with its FlashHead.

    Args:
        folder: The model's folder.
        options: How it gets its FlashHead.
        **loading: Other arguments of :func:`mlx_flashhead.models.loading.load_dense`.

    Returns:
        The model, its tokenizer and its configuration.

    Raises:
        ValueError: If the model does not exist, or as from :func:`attach_head`.
    """
    stored = sources.explicit_head(options, folder)
    loaded = load_dense(folder, **loading)
    attach_head(loaded[0], loaded[1], stored, folder, options)
    return loaded


def load_dense_head(
    folder: Path, options: HeadOptions, **loading: Any
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """As :func:`load_with_head`, with the normal (dense) head, or a finer one that options name."""
    loaded = load_dense(folder, **loading)
    _attach_fine_head(find_head(loaded[0]), folder, options)
    return loaded


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
) -> tuple[Any, ...]:
    """Loads this process's part of a model: ``mlx_lm.utils.sharded_load`` with a FlashHead.

    The FlashHead is named, or in the model's folder, or a single process has built it before.

    Args:
        path_or_hf_repo: Folder or Hugging Face repository of the model.
        pipeline_group: Processes that share the layers out.
        tensor_group: Processes that share each layer. Without either group all processes share the
            model in the way that it supports, by layers only if there is no other.
        return_config: Whether the configuration is wanted, too.
        trust_remote_code: Run the model's own Python code.
        flash_head: A folder or a Hugging Face repository of a FlashHead.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        progress: Print what is done, and bars, on standard error.

    Returns:
        ``(model, tokenizer)``, and the configuration if ``return_config``.

    Raises:
        ValueError: If the model does not exist or cannot be split in this way, if its head is split
            over the vocabulary, or if there is no FlashHead or one of another model.
    """
    options = HeadOptions(
        flash_head=flash_head,
        missing=REFUSE,
        n_probes=n_probes,
        backend=backend,
        progress=progress,
        tunes=False,
    )
    folder = resolve(path_or_hf_repo, files=["*.json", FILE_NAME])
    stored = sources.explicit_head(options, folder)
    loaded = load_dense_part(
        path_or_hf_repo,
        pipeline_group,
        tensor_group,
        tokenizer_config=tokenizer_config,
        trust_remote_code=trust_remote_code,
    )
    head = attach_head(loaded[0], loaded[1], stored, folder, options)
    assert head is not None
    policy_of(head).lockstep = True
    if return_config:
        return loaded
    return loaded[:2]


def attach(
    model: nn.Module,
    tokenizer: Any,
    flash_head: str | Path | None = None,
    *,
    n_probes: int | None = None,
    backend: str | None = None,
    build: bool = True,
    fine_head: str | Path | bool | None = None,
    head_bits: int | None = None,
    flash_head_always: bool = False,
    progress: bool = True,
) -> FlashHead:
    """Puts a FlashHead on a dense model. `detach` takes it off, and a finer head.

    Args:
        model: Any model of mlx-lm or mlx-vlm, with its final adapters and bits.
        tokenizer: What its ``load`` returned beside it: mlx-lm's tokenizer, or mlx-vlm's processor.
        flash_head: A folder or a Hugging Face repository of a FlashHead.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        build: Build a FlashHead if there is none, once.
        fine_head: Where a quantized model's finer output head comes from; True: from the original
            that the model names.
        head_bits: Bits of the finer head: 6, 8 (default) or 16.
        flash_head_always: Use the FlashHead even where it makes this model no faster here.
        progress: Print what is done, and bars, on standard error.

    Returns:
        The FlashHead.

    Raises:
        ValueError: If the model is in training mode, has a FlashHead already or a head that cannot
            have one, or if there is no FlashHead of its weights and none may be built. The model
            is unchanged.
    """
    options = HeadOptions(
        flash_head=flash_head,
        missing=_where_missing(build),
        n_probes=n_probes,
        backend=backend,
        progress=progress,
        always=flash_head_always,
        fine_head=fine_head,
        head_bits=head_bits,
    )
    source = _source_of(model, tokenizer)
    head = attach_head(model, tokenizer, sources.explicit_head(options), source, options)
    # Only DENSE leaves it out.
    assert head is not None
    return head


def _source_of(model: nn.Module, tokenizer: Any) -> Path:
    """The folder of a model in memory, as far as its tokenizer tells, else its name."""
    # A processor has a tokenizer within it.
    inner = getattr(tokenizer, "tokenizer", None)
    name = getattr(tokenizer, "name_or_path", "") or getattr(inner, "name_or_path", "")
    source = Path(str(name or type(model).__module__))
    if source.is_dir():
        return source
    return Path(source.name)


def attach_head(
    model: nn.Module, tokenizer: Any, stored: StoredHead | None, source: Path, options: HeadOptions
) -> FlashHead | None:
    """Puts the stored FlashHead on a dense model, else a cached one, else a new one.

    Args:
        model: Any model of mlx-lm or mlx-vlm, with its final adapters and bits.
        tokenizer: mlx-lm's tokenizer, or mlx-vlm's processor.
        stored: The FlashHead that is named or in the model's folder, if there is one.
        source: The model's folder, or its name.
        options: What to do if there is none.

    Returns:
        The FlashHead, or None if the model stays dense.

    Raises:
        ValueError: If the model is in training mode, has a FlashHead already or a head that cannot
            have one, or if there is no FlashHead and ``options`` refuse to build one.
    """
    if model.training:
        raise ValueError(
            "A model in training mode cannot get a FlashHead: call model.eval() first."
        )
    if get_flash_head(model) is not None:
        raise ValueError("FlashHead is already installed on this model: detach it first.")
    may_stay_dense = options.missing in (DENSE, LATER) and stored is None
    try:
        location = find_head(model)
    except UnsupportedHeadError:
        if may_stay_dense:
            return None
        raise
    _attach_fine_head(location, source, options)
    if stored is None:
        stored = sources.find(location.rows(), options.say)
    if stored is None and may_stay_dense:
        return None
    if stored is None and options.missing == REFUSE:
        raise ValueError(
            f"There is no FlashHead of {local_origin(source).known_as} yet, and none is built with "
            "`build=False` or in several processes: load the model once without these, or name a "
            "FlashHead as `flash_head`."
        )
    check_plain_product(location)
    if stored is None:
        stored = Build(model, tokenizer, source, options).wait()
        options.say("FlashHead is built. Its first steps are tried on this machine …")
    return install_stored(model, stored, options, location)


def _attach_fine_head(location: HeadLocation, source: Path, options: HeadOptions) -> None:
    """Gives a quantized model the finer head that the options ask for.

    ValueError if they name a source that cannot be used. The original that a model names may be
    out of reach: the model keeps its own head then, with a sentence.
    """
    if not options.fine_head:
        return
    # A head that is fine already is a mistake of the user: nothing is out of reach.
    check_is_coarse(location, options.head_bits)
    try:
        give_fine_head(
            location,
            source,
            options.fine_head,
            bits=options.head_bits,
            say=options.say,
            progress=options.progress,
        )
    except ValueError as error:
        if options.fine_head is not True:
            raise
        text = f"Without a finer head: {error}"
        if options.progress:
            options.say(text)
        else:
            warnings.warn(text, stacklevel=2)
