"""The settings of the loop that were measured on this machine, kept beside the FlashHeads."""

import json
import os
import platform
from collections.abc import Generator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..common.new_folder import new_file
from ..head.flash_head import FlashHead
from ..head.steps import Risk
from ..index.files import FlashHeadIndex
from ..lossless.policy import policy_of
from ..lossless.tuning import LEAST_GAIN, Tuning, is_busy, tune
from ..models.install import hidden_dtype, install, installed_head
from ..models.locate import HeadLocation, find_head
from . import head_cache as cache
from .sources import HeadOptions, StoredHead

TUNING_VARIABLE = "MLX_FLASHHEAD_TUNING"
MEASURING = "Measuring its speed on this machine, once …"


def tune_head(
    model: nn.Module, index: FlashHeadIndex, options: HeadOptions
) -> Generator[None, None, Tuning | None]:
    """Gives the FlashHead of ``model`` the settings that were measured on this machine, in steps.

    They are measured at the first use of this machine, version of MLX and dtype, in about three
    seconds; once more if the machine was busy then. A number of probes that the user has chosen
    stays, and ``always`` keeps a FlashHead that gains nothing. ``$MLX_FLASHHEAD_TUNING=off``
    measures nothing, and returns None.
    """
    off = os.environ.get(TUNING_VARIABLE) == "off"
    if options.n_probes is not None or options.drafts or not options.tunes or off:
        return None
    head = installed_head(model)
    place, key = cache.speeds_of(index.config.fingerprint), _machine(head, model)
    known = read(place)
    tuning = known.get(key)
    if tuning is None or (tuning.provisional and not is_busy()):
        tuning = yield from tune(model, index.config.verification.get("by_probes", ()))
        _write(place, known | {key: tuning})
        if tuning.dense and not options.always:
            options.say(
                f"FlashHead would not make this model faster on this machine ({tuning.gain:.2f}x, "
                f"and at least {LEAST_GAIN:g}x is asked): it stays dense. "
                "`flash_head_always=True` overrides it."
            )
    tuning.apply(head)
    if options.always:
        policy_of(head).dense = False
    return tuning


def read(place: Path) -> dict[str, Tuning]:
    """The settings by machine; none where they cannot be read."""
    known = {field.name for field in fields(Tuning)}
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        return {key: Tuning(**value) for key, value in stored.items() if set(value) == known}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(place: Path, tunings: dict[str, Tuning]) -> None:
    stored: dict[str, Any] = {key: asdict(tuning) for key, tuning in tunings.items()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as file:
            file.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    except (OSError, ValueError):
        return  # measured again next time


def _machine(head: FlashHead, model: nn.Module) -> str:
    """What the times depend on."""
    device = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    dtype = str(hidden_dtype(model)).removeprefix("mlx.core.")
    rows = head.clustered.rows.format
    return f"{device}, {head.backend}, mlx {version('mlx')}, {rows} rows, {dtype}"


def install_stored(
    model: nn.Module,
    stored: StoredHead,
    options: HeadOptions,
    location: HeadLocation | None = None,
) -> FlashHead:
    """Puts a stored FlashHead on a dense model, with the settings for this machine.

    Raises:
        ValueError: If it does not fit, or an option is not valid. The model stays unchanged.
    """
    index = stored.index
    location = location or find_head(model)
    near = index.check_fit(location.rows(), stored.source)
    if near is not None:
        options.say(near)
    config, n_probes, unverified = index.config, options.n_probes, None
    if n_probes is None and options.drafts:
        n_probes = config.draft_probes
    elif n_probes is None:
        n_probes, unverified = config.n_probes, config.unverified_probes
    head = install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=n_probes,
        unverified_probes=unverified,
        risk=Risk.of_settings(config.verification),
        eos_token_ids=config.eos_token_ids,
        backend=options.backend,
        location=location,
    )
    policy_of(head).draft_probes = options.n_probes or config.draft_probes
    for step, _ in enumerate(tune_head(model, index, options)):
        if step == 0:  # there is more to come
            options.say(MEASURING)
    return head
