"""Puts a FlashHead on a model in memory: a given one, a kept one, or a new one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..head.flash_head import FlashHead
from ..head.proposal import Risk
from ..index.files import FILE_NAME, FlashHeadIndex
from ..index.fit import check_fit
from ..models.errors import UnsupportedHeadError
from ..models.install import get_flash_head, install
from ..models.locate import find_head
from ..models.tokenizers import name_of
from ..publishing.origin import Origin
from . import cache
from .build import build as build_index
from .look_up import Found, given

BUILD, REFUSE, DENSE = "build", "refuse", "dense"
Say = Callable[[str], None]


def attach(
    model: nn.Module,
    tokenizer: Any,
    flash_head: str | Path | None = None,
    *,
    n_probes: int | None = None,
    backend: str | None = None,
    build: bool = True,
    progress: bool = True,
) -> FlashHead:
    """Puts a FlashHead on a dense model. `detach` takes it off again.

    Args:
        model: Any model of mlx-lm or mlx-vlm, with its final adapters and bits.
        tokenizer: What its ``load`` returned beside it: mlx-lm's tokenizer, or mlx-vlm's processor.
        flash_head: A folder or a Hugging Face repository of a FlashHead; default: the one that was
            built for this model before, else a new one.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        build: Build one if there is none, once, in a few minutes.
        progress: Print steps and bars on standard error.

    Returns:
        The installed FlashHead.

    Raises:
        ValueError: If there is none and none may be built, if it belongs to another model or is
            damaged, or if an argument is not valid. The model stays unchanged.
    """
    name = Path(name_of(tokenizer) or type(model).__module__).name
    origin = Origin(name)
    say = teller(progress)
    found = given(flash_head)
    missing = BUILD if build else REFUSE
    installed = install_found(
        model, tokenizer, found, origin,
        n_probes=n_probes, backend=backend, missing=missing, progress=progress, say=say,
    )  # fmt: skip
    assert installed is not None  # only DENSE leaves it out
    return installed


def install_found(
    model: nn.Module,
    tokenizer: Any,
    found: Found | None,
    origin: Origin,
    *,
    n_probes: int | None,
    backend: str | None,
    missing: str = BUILD,
    progress: bool,
    say: Say,
) -> FlashHead | None:
    """Installs the found FlashHead, else a kept one.

    Args:
        model: A dense model of mlx-lm or mlx-vlm.
        tokenizer: Its tokenizer or processor.
        found: A FlashHead of the user's or of the model's folder.
        origin: Where the model is from.
        n_probes: Clusters scored per token; default: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        missing: Without one, ``BUILD`` it, ``REFUSE``, or leave the model ``DENSE``.
        progress: Show bars.
        say: Called with a sentence at each step.

    Returns:
        The FlashHead, or None for a model that stays dense.

    Raises:
        ValueError: As in :func:`attach`.
    """
    if get_flash_head(model) is not None:
        raise ValueError("FlashHead is already installed on this model: detach it first.")
    try:
        location = find_head(model)
    except UnsupportedHeadError:
        if missing == DENSE and found is None:
            return None
        raise
    found = found or cache.find(location.rows(), say)
    if found is None:
        if missing == DENSE:
            return None
        if missing == REFUSE:
            raise ValueError(
                f"There is no FlashHead of {origin.known_as} yet, and none is built with "
                "--no-build or in several processes: use the model without them once, name a "
                "FlashHead (--flash-head), or stay --dense."
            )
        found = build_index(model, tokenizer, location, origin=origin, say=say, progress=progress)
    return install_index(
        model, found.index, n_probes=n_probes, backend=backend, source=found.source, say=say
    )


def install_index(
    model: nn.Module,
    index: FlashHeadIndex,
    *,
    n_probes: int | None = None,
    backend: str | None = None,
    source: str = FILE_NAME,
    say: Callable[[str], None] = lambda _: None,
) -> FlashHead:
    """Installs a stored FlashHead on a model whose rows it was made from, or near ones.

    Args:
        model: A dense mlx-lm model.
        index: The FlashHead.
        n_probes: Clusters scored per token; default: the number that the index names.
        backend: "metal", "mlx" or None to choose.
        source: Source of the index, for messages.
        say: Called with a sentence if the rows are near ones.

    Raises:
        ValueError: If the model has other rows, or an argument is not valid.
    """
    location = find_head(model)
    near = check_fit(index, location.rows(), source)
    if near is not None:
        say(near)
    return install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=index.config.n_probes if n_probes is None else n_probes,
        checked_probes=index.config.checked_probes if n_probes is None else None,
        risk=Risk.of_settings(index.config.lossless),
        eos_token_ids=index.config.eos_token_ids,
        backend=backend,
        location=location,
    )


def teller(progress: bool) -> Say:
    """A function that says a sentence on standard error, or nothing."""

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr, flush=True)

    return say
