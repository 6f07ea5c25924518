"""The settings of the loop that were measured on this machine, stored beside the FlashHeads.

Those of a busy machine are provisional: they are used, and measured again when it is quieter.
"""

import json
import math
import os
import platform
from collections.abc import Generator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import mlx.core as mx
import mlx.nn as nn

from ..common.new_folder import new_file
from ..decoding.policy import DecodingPolicy, policy_of
from ..decoding.rehearsal import rehearse
from ..decoding.rounding import measure_rounding
from ..decoding.tuning import Tuning, is_busy, least_gain, tune
from ..head.flash_head import FlashHead
from ..head.steps import Risk
from ..index.flash_head_index import FlashHeadIndex
from ..models.install import hidden_dtype, install, installed_head, logit_map_of
from ..models.locate import HeadLocation, find_head
from .first_gain import first_gain
from .free_head import free_head_gain
from .head_options import HeadOptions
from .sources import StoredHead, speeds_of

MEASURING = "Measuring its speed on this machine …"


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
    for step, _ in enumerate(tune_head(model, index, options)):
        if step == 0:  # there is more to come
            options.say(MEASURING)
    if not options.drafts and not policy_of(head).dense:
        _prepare(model, head)
    return head


def _prepare(model: nn.Module, head: FlashHead) -> None:
    """Compiles and measures all that the first answer would have to wait for otherwise."""
    logit_map_of(model)  # with its own kernels
    measure_rounding(head, hidden_dtype(model))
    rehearse(model)


def tune_head(
    model: nn.Module, index: FlashHeadIndex, options: HeadOptions
) -> Generator[None, None, Tuning | None]:
    """Gives the FlashHead of ``model`` the settings that were measured on this machine, in steps.

    They are measured again while they are provisional and the machine is quiet. Nothing is
    measured for probes that the user has chosen, and with ``$MLX_FLASHHEAD_TUNING=off``.
    """
    off = os.environ.get("MLX_FLASHHEAD_TUNING") == "off"
    if options.n_probes is not None or options.drafts or not options.tunes or off:
        return None
    head = installed_head(model)
    place = speeds_of(index.config)
    busy = is_busy()
    key = _conditions(model, head)
    known = read(place)
    if not known and place.exists():
        options.say(f"{place} is damaged or of another version: its speeds are measured again.")
    before = known.get(key)
    if before is not None and not options.measures and (busy or not before.provisional):
        tuning = before
    else:
        by_probes: Any = index.config.verification.get("by_probes", ())
        measured = yield from tune(model, by_probes)
        tuning = _credible(replace(measured, provisional=measured.provisional or busy), model)
        if before is not None and tuning.provisional and not options.measures:
            tuning = min(before, tuning, key=_doubt)
        _store(place, known | {key: tuning})
        said = [_why_dense(tuning)] if tuning.dense and not options.always else []
        if before is None:
            said.append(first_gain(model, tuning, finer=bool(options.fine_head)))
        if any(said):
            options.say(" ".join(filter(None, said)))
    tuning.apply(head)
    if options.always:
        policy = policy_of(head)
        policy.dense = False
        policy.sampled_dense = False
        policy.adapts = False
    return tuning


def _conditions(model: nn.Module, head: FlashHead) -> str:
    """What the times depend on, in words: the machine, the backend, MLX and the formats."""
    device = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    dtype = str(hidden_dtype(model)).removeprefix("mlx.core.")
    form = f"{head.clustered.rows.format} rows, {dtype}"
    return f"{device}, {head.backend}, mlx {version('mlx')}, {form}"


def _credible(tuning: Tuning, model: nn.Module) -> Tuning:
    """The tuning, without a predicted gain that not even a head without cost would have.

    The times from which it was predicted were those of a busy machine.
    """
    most = free_head_gain(model)
    if not tuning.predicted or tuning.gain is None or tuning.gain <= most:
        return tuning
    return replace(tuning, gain=None, dense=most < least_gain(), provisional=True)


def _doubt(tuning: Tuning) -> tuple[bool, float]:
    """Orders tunings of a busy machine, the best first."""
    return tuning.gain is None, tuning.spread


def _store(place: Path, tunings: dict[str, Tuning]) -> None:
    """Writes the settings by machine.

    Where the place cannot be written, they are measured again next time.
    """
    stored = {name: asdict(tuning) for name, tuning in tunings.items()}
    with suppress(OSError, ValueError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as file:
            file.write_text(json.dumps(stored, indent=1), encoding="utf-8")


def _why_dense(tuning: Tuning) -> str:
    """Says that a model stays dense: its FlashHead gains less than is needed."""
    needed = f"at least {least_gain():g} x is needed"
    figures = needed if tuning.gain is None else f"{', '.join(_words(tuning))}, and {needed}"
    later = " for now, and is measured again later" if tuning.provisional else ""
    return (
        f"FlashHead would not make this model faster on this machine ({figures}): it stays "
        f"dense{later}. `flash_head_always=True` overrides it."
    )


def speed_text(known: Tuning | DecodingPolicy) -> str:
    """A gain with all that limits it, such as "1.20 x (predicted, provisional)"."""
    if known.gain is None:
        return "not known yet"
    gain, *doubts = _words(known)
    if known.dense:
        doubts.insert(0, "dense")
    return f"{gain} ({', '.join(doubts)})" if doubts else gain


def _words(known: Tuning | DecodingPolicy) -> list[str]:
    """A gain, then the words that make it doubtful."""
    return [
        f"{known.gain:.2f} x",
        *(["predicted"] if known.predicted else []),
        *(["provisional"] if known.provisional else []),
    ]


def read(place: Path) -> dict[str, Tuning]:
    """The settings by machine. Those that are damaged are left out."""
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        stored = json.loads(place.read_text(encoding="utf-8"))
        return {key: Tuning(**values) for key, values in stored.items() if _is_valid(values)}
    return {}


def _is_valid(values: Any) -> bool:
    """Whether these are the fields of a `Tuning`, each of its type and in its range."""
    hints = get_type_hints(Tuning)
    if not isinstance(values, dict) or values.keys() != hints.keys():
        return False
    return all(_is_field(value, hints[name]) for name, value in values.items())


def _is_field(value: Any, hint: Any) -> bool:
    types = get_args(hint) or (hint,)
    if type(value) not in types:
        return False
    least = 1 if int in types else 0
    return value is None or least <= value < math.inf
