"""The build of a FlashHead beside the use of its model: the answer comes first.

Verified text does not depend on the FlashHead, so nobody waits for one. The model answers with its
normal (dense) head until it is there.
"""

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

from ..conversion import Step, Steps, take_all
from ..conversion.build import STEP_SECONDS, expected_seconds, index_nbytes, model_index
from ..conversion.options import IndexOptions, make_recipe
from ..lossless.tuning import Tuning
from ..models.fetch import HOME_VARIABLE, home, lock_of
from ..models.install import get_flash_head
from ..models.libraries import UnsupportedHeadError, is_vlm, text_side
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..models.origin import local_origin
from . import sources
from .sources import HeadOptions, StoredHead
from .tuned import MEASURING, install_stored, tune_head

DRAFT_CLUSTER_SIZE = 32  # within a tenth of the head's bytes more tokens than with 16
LOCK_SECONDS, PAUSE_SECONDS = 0.5, 0.02  # between looks at another process's build
ANEW_SECONDS = 600.0  # for the text of a requested build: on a busy machine, too
# A first build that may take longer, as on a busy machine, is a shorter one. Clusters of 32 rows
# are found in half the time; their FlashHead reads up to a tenth more or less (docs/converting.md).
LONG_BUILD_SECONDS = 300.0
SHORT_BUILD: dict[str, Any] = {
    "cluster_size": 32,
    "calibration_positions": 800,
    "calibration_seconds": 30.0,
}


def build_steps(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    source: Path,
    options: HeadOptions,
    waits: bool = True,
    anew: bool = False,
    step_seconds: float = math.inf,
    drafted: Steps[np.ndarray] | None = None,
) -> Steps[StoredHead | None]:
    """Builds a FlashHead in steps. A build that is dropped between them leaves nothing behind.

    Where another process builds it, it ``waits`` for that one, and builds itself if that one has
    ended without; or it returns None. ``anew`` replaces one that there is, and takes more time.
    ``drafted`` gives a drafter's states, instead of text. ValueError at a step, if the model cannot
    have one.
    """
    rows, say = location.rows(), options.say
    place = sources.place_of(rows)
    lock = None
    with suppress(OSError):  # else nothing can be cached there
        lock = lock_of(place)
    if lock is not None and not lock.is_locked:
        other = "Another process is building the FlashHead of this model: it is used "
        say(other + ("as soon as it is there." if waits else "next time."))
        if not waits:
            return None
        next_try = time.perf_counter() + LOCK_SECONDS
        while not lock.is_locked:
            time.sleep(PAUSE_SECONDS)
            yield Step("Waiting for the other process", 0, 1, "build")
            if time.perf_counter() > next_try:
                with suppress(Timeout):
                    lock.acquire(timeout=0)
                next_try = time.perf_counter() + LOCK_SECONDS
    try:
        stored = None if anew else sources.find(rows, lambda _: None)
        if stored is not None:
            return stored
        of_index = IndexOptions(quick=True)
        if drafted is not None:
            of_index = replace(of_index, cluster_size=DRAFT_CLUSTER_SIZE)
        if anew:
            of_index = replace(of_index, calibration_seconds=ANEW_SECONDS)
        elif expected_seconds(rows, of_index) > LONG_BUILD_SECONDS:
            of_index = replace(of_index, **SHORT_BUILD)
        of_index.check_size(rows.n_rows)
        origin = local_origin(source)
        obstacle = sources.obstacle(place, index_nbytes(rows))
        minutes = max(1, math.ceil(round(expected_seconds(rows, of_index)) / 60))
        say(
            f"Building the FlashHead of {origin.known_as}, which takes at most about "
            f"{'a minute' if minutes == 1 else f'{minutes} minutes'}. "
            + (f"It is kept in {place}." if obstacle is None else _not_kept(obstacle))
        )
        del rows
        recipe = make_recipe(of_index, origin, origin.result_name())
        if drafted is not None:
            del recipe["command"]  # no command converts a drafter of mlx-vlm
        tokenizer = text_side(model, tokenizer)
        how: dict[str, Any] = {"drafted": drafted, "step_seconds": step_seconds}
        index = yield from model_index(model, tokenizer, location, of_index, **how)
        index = replace(index, config=replace(index.config, recipe=recipe))
        if index.config.calibration.get("cut_short"):
            say(
                "This machine was busy, so the build was cut short, after "
                f"{index.config.calibration['positions']:,} positions: "
                "mlx_flashhead.cache --rebuild MODEL makes a faster one."
            )
        if obstacle is None:
            try:
                sources.keep(index, place)
            except OSError as error:
                say(_not_kept(error.strerror or str(error)))
        return StoredHead(index, str(place))
    finally:
        if lock is not None:
            lock.release()


def _not_kept(obstacle: str) -> str:
    return (
        f"It is not kept, since {home()} cannot be written ({obstacle}): set "
        f"{HOME_VARIABLE} to another place, or it is built again next time."
    )


def finish(steps: Steps[StoredHead | None], options: HeadOptions) -> StoredHead | None:
    """Takes all steps that are left, with bars."""
    with redirect_stdout(sys.stderr):  # standard output is the command's own
        return take_all(steps, progress=options.progress)


class BackgroundBuild:
    """A FlashHead that is built in steps, whenever there is time. ``how`` are ``step_seconds``,
    ``waits`` and ``anew`` of `build_steps`. UnsupportedHeadError if there can be none."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, **how: Any
    ):
        self._model, self._options = model, options
        location = find_head(model)
        check_plain_product(location)
        how = {"step_seconds": STEP_SECONDS} | how
        self._steps: Generator[Any, None, Any] = build_steps(
            model, tokenizer, location, source=source, options=options, **how
        )
        self._result: StoredHead | Tuning | None = None  # of the steps

    def advance(self) -> bool:
        """Takes a step, after `install` one that measures some tokens. Returns whether there are
        more. ValueError if the model can have no FlashHead after all."""
        try:
            next(self._steps)
            return True
        except StopIteration as end:
            self._result = end.value
            return False

    def drop(self) -> None:
        """Ends the build. Nothing is left of it."""
        self._steps.close()

    def install(self) -> bool:
        """Puts the FlashHead on the model, between two tokens. Returns whether that was done. The
        steps that follow measure the settings for this machine."""
        stored = self._result
        if not isinstance(stored, StoredHead) or get_flash_head(self._model) is not None:
            return False
        install_stored(self._model, stored, replace(self._options, tunes=False))
        self._steps = tune_head(self._model, stored.index, self._options)
        self._result = None
        return True

    def finish(self) -> None:
        """Takes all steps, installs the FlashHead, and says what it took and when it pays back."""
        began, say = time.perf_counter(), self._options.say
        self._result = finish(self._steps, self._options)
        seconds = time.perf_counter() - began
        if not self.install():
            return
        if self.advance():
            say(MEASURING)
        while self.advance():
            pass
        tuning, took = self._result, f"build took {seconds:.0f} s"
        if not isinstance(tuning, Tuning):
            say(f"FlashHead is ready for next time. Its {took}.")
        elif tuning.dense:
            say(f"The {took}.")  # that the model stays dense has been said
        else:
            makes = "should make" if tuning.predicted else "makes"
            tokens = seconds / (tuning.dense_seconds * (1 - 1 / tuning.gain))
            say(
                f"FlashHead is ready for next time. Its {took}, and it {makes} this model "
                f"{tuning.gain:.2f} times as fast on this machine: that pays back after about "
                f"{float(f'{tokens:.2g}'):,.0f} tokens."
            )


def background_build(
    model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, **how: Any
) -> BackgroundBuild | None:
    """The build for a model that has no FlashHead; None if it has one or can have none."""
    if get_flash_head(model) is not None or is_vlm(model):
        return None
    try:
        return BackgroundBuild(model, tokenizer, source, options, **how)
    except UnsupportedHeadError as error:
        options.say(f"Without FlashHead: {error}")
        return None


class IdleBuild:
    """Advances a build in a thread while its model is idle, and installs it at its end."""

    def __init__(self, build: BackgroundBuild):
        self._build = build
        self._using_model = Lock()
        self._idle, self._closed = Event(), False
        self._idle.set()
        self._thread = Thread(target=self._run, name="build", daemon=True)
        self._thread.start()

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
        """Drops what is not built."""
        self._closed = True
        self._idle.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            more = True
            while more:
                self._idle.wait()
                with self._using_model:
                    build = self._build
                    more = not self._closed and (build.advance() or build.install())
        except (ValueError, OSError, RuntimeError) as error:
            print(f"Without FlashHead: {error}", file=sys.stderr)
        finally:
            self._build.drop()
            mx.clear_streams()  # which must go before their thread ends
