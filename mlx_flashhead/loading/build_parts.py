"""The parts in which a FlashHead is built at the first use of its model.

What an unfinished build has computed is kept, and the next one goes on from there.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from filelock import BaseFileLock, FileLock, Timeout

from ..common.new_folder import new_file
from ..conversion import Progress, Task
from ..conversion.build import expected_seconds, model_index
from ..conversion.checkpoint import Checkpoint
from ..conversion.forecast import Forecaster
from ..conversion.options import IndexOptions
from ..conversion.recipe import make_recipe
from ..head.matrix import Matrix
from ..models.fetch import HOME_VARIABLE, home
from ..models.locate import HeadLocation
from ..models.origin import local_origin
from ..models.vlm import text_side
from ..version import __version__
from . import cached
from .head_options import HeadOptions
from .sources import StoredHead, find

# A first build that may take longer, as on a busy machine, is a shorter one (docs/converting.md).
LONG_BUILD_SECONDS = 300.0
# Something is kept of so many unfinished builds.
MOST_UNFINISHED = 3
# This file of an unfinished build says how its index is made.
PLAN = "plan.json"


def build_parts(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    source: Path,
    options: HeadOptions,
    follow: Callable[[Forecaster], object],
    anew: bool = False,
    step_seconds: float = math.inf,
) -> Task[StoredHead]:
    """Builds a FlashHead in short parts, or waits for another process that builds it.

    Of a build that is dropped between two parts, what it has computed is kept.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or its processor.
        location: Its head.
        source: Its folder, which names it.
        options: How the model gets its FlashHead.
        follow: Takes what follows the build, once it is known how the index is made.
        anew: Replace a FlashHead that there is, and take more time.
        step_seconds: About how long the model works at once.

    Returns:
        The FlashHead.

    Raises:
        ValueError: In one of the parts, if the model cannot have one.
    """
    rows = location.rows()
    folder = cached.folder_of(rows)
    lock = yield from _locked(folder, options)
    checkpoint = None
    try:
        stored = find(rows, lambda _: None)
        if stored is not None and not anew:
            return stored
        unfinished = cached.unfinished_of(folder)
        how = _planned(unfinished)
        goes_on = how is not None and not anew
        if how is None or anew:
            how = _index_options(rows, anew=anew)
            how.check_size(rows.n_rows)
            _begin(unfinished, how)
        checkpoint = Checkpoint(unfinished)
        origin = local_origin(source)
        seconds = expected_seconds(rows, how)
        follow(Forecaster(seconds, limit=how.calibration_seconds))
        beside = step_seconds != math.inf
        total = sum(seconds.values())
        options.say(_announcement(origin.known_as, total, folder, beside=beside, goes_on=goes_on))
        # What is said comes before what takes time.
        yield Progress("", 0, 0)
        del rows
        recipe = make_recipe(how, origin, origin.result_name())
        index = yield from model_index(
            model,
            text_side(model, tokenizer),
            location,
            how,
            step_seconds=step_seconds,
            checkpoint=checkpoint,
        )
        index = replace(index, config=replace(index.config, recipe=recipe))
        if index.config.calibration.get("cut_short"):
            n_positions = index.config.calibration["positions"]
            options.say(
                f"This machine was busy, so the build was cut short, after {n_positions:,} "
                "positions: mlx_flashhead.cache --rebuild MODEL makes a faster one."
            )
        try:
            cached.keep(index, folder)
        except OSError as error:
            reason = error.strerror or error
            options.say(
                f"It is not kept, since {home()} cannot be written ({reason}): set {HOME_VARIABLE} "
                "to another place, or it is built again next time."
            )
        checkpoint = None
        shutil.rmtree(unfinished, ignore_errors=True)
        return StoredHead(index, str(folder))
    except Exception:
        # What is kept may be the reason.
        checkpoint = None
        shutil.rmtree(cached.unfinished_of(folder), ignore_errors=True)
        raise
    finally:
        if checkpoint is not None:
            checkpoint.write()
        if lock is not None:
            lock.release()


def _announcement(name: str, seconds: float, folder: Path, *, beside: bool, goes_on: bool) -> str:
    """Says that a build begins, or goes on, and how long it takes at most."""
    minutes = max(1, math.ceil(round(seconds) / 60))
    duration = f"{minutes} minutes"
    if minutes == 1:
        duration = "a minute"
    when = ""
    if beside:
        when = " while the model is idle"
    if goes_on:
        return f"Going on with the FlashHead of {name}{when}, from where its build was left."
    return (
        f"Building the FlashHead of {name}{when}, which takes at most about {duration}. It is kept "
        f"in {folder}."
    )


def _locked(folder: Path, options: HeadOptions) -> Task[BaseFileLock | None]:
    """Waits for the lock of a FlashHead's folder; None if nothing can be cached there."""
    file = home() / "locks" / f"{folder.name}.lock"
    lock = FileLock(file, thread_local=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=0)
    except OSError:
        return None
    if not lock.is_locked:
        options.say(
            "Another process is building the FlashHead of this model: it is used once it is there."
        )
    while not lock.is_locked:
        time.sleep(0.02)
        yield Progress("Waiting for the other process", 0, 1)
        with suppress(Timeout):
            lock.acquire(timeout=0)
    return lock


def _index_options(rows: Matrix, *, anew: bool) -> IndexOptions:
    """How an index is made at the first use of a model, or anew."""
    how = IndexOptions(quick=True)
    if anew:
        # A busy machine reads all of the text, too.
        return replace(how, calibration_seconds=600.0)
    if sum(expected_seconds(rows, how).values()) > LONG_BUILD_SECONDS:
        return replace(how, cluster_size=32, calibration_positions=800, calibration_seconds=30.0)
    return how


def _planned(unfinished: Path) -> IndexOptions | None:
    """How the index of an unfinished build is made; None if there is no such build."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        plan = json.loads((unfinished / PLAN).read_bytes())
        if plan["version"] == __version__:
            return IndexOptions(**plan["options"])
    return None


def _begin(unfinished: Path, how: IndexOptions) -> None:
    """Makes the folder of a build, and removes those of the oldest other ones."""
    shutil.rmtree(unfinished, ignore_errors=True)
    with suppress(OSError):
        others = sorted(unfinished.parent.glob("*"), key=lambda path: path.stat().st_mtime)
        for path in others[: len(others) - MOST_UNFINISHED + 1]:
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with new_file(unfinished / PLAN) as file:
            file.write_text(json.dumps({"version": __version__, "options": asdict(how)}))
