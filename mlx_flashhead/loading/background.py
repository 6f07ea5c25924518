"""The build of a FlashHead beside the use of its model, which answers with its normal (dense) head
until the FlashHead is there: verified text does not depend on it."""

import math
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from filelock import Timeout

from ..conversion import Progress, Task, run_task
from ..conversion.build import STEP_SECONDS, expected_seconds, model_index
from ..conversion.options import IndexOptions
from ..conversion.recipe import make_recipe
from ..decoding.policy import policy_of
from ..models.errors import UnsupportedHeadError
from ..models.fetch import HOME_VARIABLE, home, lock_of
from ..models.install import get_flash_head
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..models.origin import local_origin
from ..models.vlm import is_vlm, text_side
from . import sources
from .head_options import HeadOptions
from .sources import StoredHead
from .tuned import install_stored, tune_head

# A first build that may take longer, as on a busy machine, is a shorter one (docs/converting.md).
LONG_BUILD_SECONDS = 300.0


def build_steps(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    source: Path,
    options: HeadOptions,
    anew: bool = False,
    step_seconds: float = math.inf,
    drafted: Task[np.ndarray] | None = None,
) -> Task[StoredHead]:
    """Builds a FlashHead in steps. A build that is dropped between them leaves nothing behind.

    Waits for another process that builds it. ``anew`` replaces one that there is, and takes more
    time. ``drafted`` gives a drafter's states, instead of text. ValueError at a step, if the model
    cannot have one.
    """
    rows, say = location.rows(), options.say
    place, lock = sources.place_of(rows), None
    with suppress(OSError):  # else nothing can be cached there
        lock = lock_of(place)
    if lock is not None and not lock.is_locked:
        say("Another process is building the FlashHead of this model: it is used once it is there.")
        while not lock.is_locked:
            time.sleep(0.02)
            yield Progress("Waiting for the other process", 0, 1, "build")
            with suppress(Timeout):
                lock.acquire(timeout=0)
    try:
        stored = None if anew else sources.find(rows, lambda _: None)
        if stored is not None:
            return stored
        how = IndexOptions(quick=True)
        if drafted is not None:  # within a tenth of the head's bytes more tokens than with 16
            how = replace(how, cluster_size=32)
        if anew:
            how = replace(how, calibration_seconds=600.0)  # all of its text on a busy machine, too
        elif expected_seconds(rows, how) > LONG_BUILD_SECONDS:
            less: dict[str, Any] = {"calibration_positions": 800, "calibration_seconds": 30.0}
            how = replace(how, cluster_size=32, **less)
        how.check_size(rows.n_rows)
        origin = local_origin(source)
        minutes = max(1, math.ceil(round(expected_seconds(rows, how)) / 60))
        say(
            f"Building the FlashHead of {origin.known_as}, which takes at most about "
            f"{'a minute' if minutes == 1 else f'{minutes} minutes'}. It is kept in {place}."
        )
        del rows
        recipe = make_recipe(how, origin, origin.result_name())
        if drafted is not None:
            del recipe["command"]  # no command converts a drafter of mlx-vlm
        text = text_side(model, tokenizer)
        index = yield from model_index(
            model, text, location, how, drafted=drafted, step_seconds=step_seconds
        )
        index = replace(index, config=replace(index.config, recipe=recipe))
        if index.config.calibration.get("cut_short"):
            n_positions = index.config.calibration["positions"]
            say(
                f"This machine was busy, so the build was cut short, after {n_positions:,} "
                "positions: mlx_flashhead.cache --rebuild MODEL makes a faster one."
            )
        try:
            sources.keep(index, place)
        except OSError as error:
            reason = error.strerror or error
            say(
                f"It is not kept, since {home()} cannot be written ({reason}): set "
                f"{HOME_VARIABLE} to another place, or it is built again next time."
            )
        return StoredHead(index, str(place))
    finally:
        if lock is not None:
            lock.release()


def finish(steps: Task[StoredHead], options: HeadOptions) -> StoredHead:
    """Takes all steps that are left, with bars."""
    with redirect_stdout(sys.stderr):  # standard output is the command's own
        return run_task(steps, progress=options.progress)


def build_now(
    model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, *, anew: bool = False
) -> None:
    """Builds and installs a FlashHead, and says what it took; raises as `build_steps`."""
    began, location = time.perf_counter(), find_head(model)
    check_plain_product(location)
    steps = build_steps(model, tokenizer, location, source=source, options=options, anew=anew)
    stored = finish(steps, options)
    seconds = time.perf_counter() - began
    policy = policy_of(install_stored(model, stored, options, location))  # it says what it gains
    if not policy.dense:
        options.say(f"FlashHead is ready for next time. Its build took {seconds:.0f} s.")


class BackgroundBuild:
    """A FlashHead that is built in steps, then installed, between two tokens, and measured;
    UnsupportedHeadError if there can be none."""

    def __init__(self, model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions):
        self._model, self._options = model, options
        location = find_head(model)
        check_plain_product(location)
        how: Any = {"source": source, "options": options, "step_seconds": STEP_SECONDS}
        self._steps = self._all_steps(build_steps(model, tokenizer, location, **how))

    def _all_steps(self, build: Task[StoredHead]) -> Generator[Any, None, None]:
        stored = yield from build
        if get_flash_head(self._model) is None:
            install_stored(self._model, stored, replace(self._options, tunes=False))
            yield
            yield from tune_head(self._model, stored.index, self._options)

    def advance(self) -> bool:
        """Takes a step, and returns whether it was not the end; ValueError as `build_steps`."""
        ended = object()
        return next(self._steps, ended) is not ended

    def drop(self) -> None:
        self._steps.close()


def background_build(
    model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions
) -> BackgroundBuild | None:
    """The build for a model that has no FlashHead; None if it has one or can have none."""
    if get_flash_head(model) is not None or is_vlm(model):
        return None
    try:
        return BackgroundBuild(model, tokenizer, source, options)
    except UnsupportedHeadError as error:
        options.say(f"Without FlashHead: {error}")
        return None


class IdleBuild:
    """Advances a build in a thread while its model is idle."""

    def __init__(self, build: BackgroundBuild):
        self._build = build
        self._using_model = Lock()
        self._idle, self._closed = Event(), False
        self._idle.set()
        self._thread = Thread(target=self._run, name="build", daemon=True)
        self._thread.start()

    @property
    def is_building(self) -> bool:
        """Whether the build, or the measurement of its speed, has not ended."""
        return self._thread.is_alive()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which the model may be used. Waits for the step that is being taken."""
        self._idle.clear()
        try:
            with self._using_model:
                yield
        finally:
            self._idle.set()

    def close(self) -> None:
        self._closed = True
        self._idle.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            more = True
            while more:
                self._idle.wait()
                with self._using_model:
                    more = not self._closed and self._build.advance()
        except (ValueError, OSError, RuntimeError) as error:
            print(f"Without FlashHead: {error}", file=sys.stderr)
        finally:
            self._build.drop()
            mx.clear_streams()  # which must go before their thread ends
