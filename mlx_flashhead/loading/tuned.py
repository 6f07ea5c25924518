"""What a FlashHead gains on this machine, stored beside the FlashHeads.

What a busy machine has measured is used, and measured again when the machine is quiet.
"""

import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn

from ..common.stored import store, stored
from ..decoding.policy import Tuning, least_gain, policy_of
from ..decoding.rehearsal import rehearse
from ..decoding.rounding import measure_rounding
from ..decoding.tuning import is_busy, prepare_wide_steps, tune
from ..head.backend import device_name
from ..head.flash_head import FlashHead
from ..head.steps import Risk
from ..index.flash_head_index import FlashHeadIndex
from ..models.install import hidden_dtype, install, installed_head, logit_map_of
from ..models.locate import HeadLocation, find_head
from .first_gain import first_gain
from .head_options import HeadOptions
from .sources import StoredHead, speeds_of

MEASURING = "Measuring its speed on this machine …"
BUSY = "measured on a busy machine"


def install_stored(
    model: nn.Module, stored: StoredHead, options: HeadOptions, location: HeadLocation | None = None
) -> FlashHead:
    """Puts a stored FlashHead on a dense model, with the settings for this machine.

    Raises:
        ValueError: If it does not fit, or an option is not valid.
    """
    index = stored.index
    location = location or find_head(model)
    if near := index.check_fit(location.rows(), stored.source):
        options.say(near)
    config = index.config
    n_probes = options.n_probes
    chosen = n_probes is not None or options.drafts
    if n_probes is None:
        n_probes = config.draft_probes if options.drafts else config.n_probes
    head = install(
        model,
        index.token_ids,
        index.centroids,
        n_probes=n_probes,
        unverified_probes=None if chosen else config.unverified_probes,
        risk=Risk.from_settings(config.verification),
        eos_token_ids=config.eos_token_ids,
        backend=options.backend,
        location=location,
    )
    policy_of(head).draft_probes = options.n_probes or config.draft_probes
    if not options.drafts:  # nothing is compiled or measured within a text
        logit_map_of(model)  # with its own kernels
        measure_rounding(head, hidden_dtype(model))
        rehearse(model)
    for step, _ in enumerate(tune_head(model, index, options)):
        if step == 0:  # there is more to come
            options.say(MEASURING)
    return head


def tune_head(
    model: nn.Module, index: FlashHeadIndex, options: HeadOptions
) -> Generator[None, None, Tuning | None]:
    """Has the loops go by what the FlashHead of ``model`` gains on this machine, in steps.

    It is measured once, and again while only a busy machine has measured it. Nothing is measured
    for probes that the user has chosen, and with ``$MLX_FLASHHEAD_TUNING=off``.
    """
    off = os.environ.get("MLX_FLASHHEAD_TUNING") == "off"
    if options.n_probes is not None or options.drafts or not options.tunes or off:
        return None
    head = installed_head(model)
    place = speeds_of(index.config)
    key = _conditions(model, head)
    known = read(place)
    if not known and place.exists():
        options.say(f"{place} is damaged or of another version: its speeds are measured again.")
    before = known.get(key)
    if before is not None and not options.measures and (is_busy() or not before.busy):
        tuning = before
    else:
        tuning = yield from tune(model, _rejected(index, head.n_probes))
        store(place, known | {key: tuning})
        said = [_why_dense(tuning)] if tuning.dense and not options.always else []
        if before is None:
            said.append(first_gain(model, tuning, finer=bool(options.fine_head)))
        if any(said):
            options.say(" ".join(filter(None, said)))
    apply_tuning(model, tuning, options)
    return tuning


def apply_tuning(model: nn.Module, tuning: Tuning, options: HeadOptions) -> None:
    """Has the loops go by what was measured."""
    policy_of(installed_head(model)).take(tuning, always=options.always)
    prepare_wide_steps(model)


def _rejected(index: FlashHeadIndex, n_probes: int) -> tuple[float, float]:
    """The shares of greedy and sampled proposals that were rejected in the text of its making."""
    for row in index.config.verification.get("by_probes", ()):
        if row["n_probes"] == n_probes:
            return row["greedy_differs"], row["sampled_differs"]
    return 0.0, 0.0


def _conditions(model: nn.Module, head: FlashHead) -> str:
    """What the times depend on, in words: the machine, the backend, MLX and the formats."""
    dtype = str(hidden_dtype(model)).removeprefix("mlx.core.")
    form = f"{head.clustered.rows.format} rows, {dtype}"
    return f"{device_name()}, {head.backend}, mlx {version('mlx')}, {form}"


def read(place: Path) -> dict[str, Tuning]:
    """What was measured, by machine; nothing where the file is not there, or damaged."""
    return stored(place, Tuning)


def _why_dense(tuning: Tuning) -> str:
    """Says that a model stays dense: its FlashHead gains less than is needed."""
    later = " for now, and is measured again when the machine is less busy" if tuning.busy else ""
    return (
        f"FlashHead would not make this model faster on this machine ({tuning.gain:.2f} x, and at "
        f"least {least_gain():g} x is needed): it stays dense{later}. "
        "`flash_head_always=True` overrides it."
    )


def speed_text(tuning: Tuning | None) -> str:
    """A gain with what limits it, such as "1.20 x (measured on a busy machine)"."""
    if tuning is None:
        return "not known yet"
    limits = ["dense"] * tuning.dense + [BUSY] * tuning.busy
    return f"{tuning.gain:.2f} x" + (f" ({', '.join(limits)})" if limits else "")
