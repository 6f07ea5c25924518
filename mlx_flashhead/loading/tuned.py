"""What a FlashHead gains on this machine: measured once, and stored beside the FlashHeads.

What a busy machine has measured decides nothing: the model stays dense until it is quiet.
"""

import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn

from ..common.machine import is_busy
from ..common.stored import store, stored
from ..decoding.measuring.tuning import prepare_wide_steps, tune
from ..decoding.policy import Tuning, policy_of
from ..head.backend import device_name
from ..head.flash_head import FlashHead
from ..index.flash_head_index import FlashHeadIndex
from ..models.install import hidden_dtype, installed_head
from .cached import speeds_of
from .gain_sentences import first_gain, why_dense
from .head_options import HeadOptions


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
    file = speeds_of(index.config)
    key = _conditions(model, head)
    known = read(file)
    if not known and file.exists():
        options.say(f"{file} is damaged or of another version: its speeds are measured again.")
    before = known.get(key)
    if before is not None and not options.measures and (is_busy() or not before.busy):
        tuning = before
    else:
        tuning = yield from tune(model, _rejected(index, head.n_probes))
        store(file, known | {key: tuning})
        _say_measured(model, tuning, before, options)
    apply_tuning(model, tuning, options)
    return tuning


def _say_measured(
    model: nn.Module, tuning: Tuning, before: Tuning | None, options: HeadOptions
) -> None:
    """Says in a line what was measured: why the model stays dense, and its gain the first time."""
    sentences = []
    if tuning.dense and not options.always:
        sentences.append(why_dense(tuning))
    was_known = before is not None and not before.busy
    if not was_known and not tuning.busy:
        sentences.append(first_gain(model, tuning, finer=bool(options.fine_head)))
    line = " ".join(filter(None, sentences))
    if line:
        options.say(line)


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


def read(file: Path) -> dict[str, Tuning]:
    """What was measured, by machine; nothing where the file is not there, or damaged."""
    return stored(file, Tuning)
