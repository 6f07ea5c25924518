"""Puts a FlashHead on a model in memory: a named one, a kept one, or a new one."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import mlx.core as mx
import mlx.nn as nn

from ..conversion.calibration import ANSWER_TOKENS, builtin_requests, drafted_states
from ..conversion.options import IndexOptions
from ..head.flash_head import FlashHead
from ..lossless.policy import policy_of
from ..lossless.sequence import random_state
from ..models.compat.mlx_vlm import drafted_answer, when_drafted
from ..models.finer_head import give_fine_head
from ..models.install import get_flash_head
from ..models.libraries import UnsupportedHeadError, architecture, is_vlm
from ..models.locate import HeadLocation, check_plain_product, drafter_head, find_head
from ..models.origin import local_origin
from ..models.tokenizers import name_of, prompt_of, text_side
from . import head_cache as cache
from .background import build_steps, finish
from .sources import BUILD, DENSE, LATER, REFUSE, HeadOptions, StoredHead, explicit_head
from .tuned import install_stored

# models of mlx-vlm, whose drafters may have heads of their own, their tokenizers and the choices
_targets: WeakKeyDictionary[FlashHead, tuple[ref[nn.Module], Any, HeadOptions]]
_targets = WeakKeyDictionary()


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
    progress: bool = True,
) -> FlashHead:
    """Puts a FlashHead on a dense model. `detach` takes it off again, and a finer head.

    Args:
        model: Any model of mlx-lm or mlx-vlm, with its final adapters and bits.
        tokenizer: What its ``load`` returned beside it: mlx-lm's tokenizer, or mlx-vlm's processor.
        flash_head: A folder or a Hugging Face repository of a FlashHead; default: the one that was
            built for this model before, else a new one.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        build: Build one if there is none, once, in a few minutes.
        fine_head: A repository, folder or safetensors file of the original of a quantized model,
            whose finer output head the model gets first; True: find it. Where that fails, the model
            keeps its own.
        head_bits: Bits of the finer head: 6, 8 (default) or 16.
        progress: Print steps and bars on standard error.

    Returns:
        The installed FlashHead.

    Raises:
        ValueError: If there is none and none may be built, if it belongs to another model or is
            damaged, or if an argument is not valid. The model stays unchanged.
    """
    missing = BUILD if build else REFUSE
    options = HeadOptions(
        flash_head,
        missing,
        n_probes,
        backend,
        progress,
        fine_head=fine_head,
        head_bits=head_bits,
    )
    source = Path(name_of(tokenizer) or type(model).__module__)
    source = source if source.is_dir() else Path(source.name)
    head = attach_head(model, tokenizer, explicit_head(options), source, options)
    assert head is not None  # only DENSE leaves it out
    return head


def attach_head(
    model: nn.Module,
    tokenizer: Any,
    stored: StoredHead | None,
    source: Path,
    options: HeadOptions,
) -> FlashHead | None:
    """Puts the stored FlashHead on a dense model, else a kept one, else a new one, as `attach`.

    ``source`` is the model's folder, or its name. Returns None for a model that stays dense.
    """
    if model.training:
        raise ValueError(
            "This model is in training mode, whose dropout would change the states that a "
            "FlashHead is built from: call model.eval() first."
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
    if options.fine_head:
        attach_fine_head(location, source, options)
    rows = location.rows()
    stored = stored or cache.find(rows, options.say)
    if stored is None and may_stay_dense:
        return None
    if stored is None and options.missing == REFUSE:
        raise ValueError(
            f"There is no FlashHead of {local_origin(source).known_as} yet, and `build=False` or "
            "several processes build none: use the model without them once, or name one as "
            "`flash_head`."
        )
    check_plain_product(location)
    if stored is None:
        steps = build_steps(model, tokenizer, location, source=source, options=options)
        stored = finish(steps, options)
        assert stored is not None  # it has waited for other processes
    del rows  # the installation moves them
    head = install_stored(model, stored, options, location)
    if is_vlm(model):
        _targets[head] = ref(model), tokenizer, options
        when_drafted(_attach_to_drafter)
    return head


def attach_fine_head(location: HeadLocation, source: Path, options: HeadOptions) -> None:
    """Gives a quantized model the finer head that the options name; it keeps its own otherwise."""
    assert options.fine_head is not None
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
        options.warn(f"Without a finer head: {error}")


def _attach_to_drafter(target: nn.Module, drafter: nn.Module, kind: str) -> None:
    """Gives a drafter with a head of its own a FlashHead, kept or built, where its target has one.

    It is built from states of the drafter as it drafts answers of the target.
    """
    head = get_flash_head(target)
    # of a drafter that drafts for the build the target is not known
    known = None if head is None else _targets.pop(head, None)
    if head is None or known is None:
        return
    model_of, tokenizer, options = known
    model, options = model_of(), replace(options, n_probes=None, drafts=True)
    assert model is not None  # its head is in use
    try:
        location = drafter_head(drafter, target)
        if location is None or get_flash_head(location.module) is not None:
            return
        check_plain_product(location)
        stored = cache.find(location.rows(), options.say)
        if stored is None and options.missing == BUILD:
            text = text_side(model, tokenizer)
            answers = (
                drafted_answer(model, drafter, kind, prompt_of(text, request), ANSWER_TOKENS)
                for request in builtin_requests()
            )
            seconds = IndexOptions.calibration_seconds
            drafted = drafted_states(location, answers, text.eos_token_ids, seconds=seconds)
            source = Path(architecture(drafter))
            steps = build_steps(
                drafter, tokenizer, location, source=source, options=options, drafted=drafted
            )
            with random_state(mx.random.key(0)):
                stored = finish(steps, options)
        if stored is not None:
            head = install_stored(drafter, stored, options, location)
            head.serve_drafts(options.n_probes or stored.index.config.draft_probes)
            policy_of(head).drafts_only = True
    except Exception as error:  # whatever it is, the drafter goes on with its own head
        options.say(f"The drafter has no FlashHead: {error}")
    finally:
        _targets[head] = known
