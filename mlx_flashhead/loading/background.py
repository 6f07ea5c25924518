"""The build of a FlashHead beside the use of its model.

The model answers with its normal (dense) head until the FlashHead is there: verified text does not
depend on it.
"""

import atexit
import copy
import math
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from filelock import BaseFileLock, FileLock, Timeout

from ..common.command import sentence
from ..conversion import Progress, Task, run_task
from ..conversion.build import STEP_SECONDS, expected_seconds, model_index
from ..conversion.options import IndexOptions, make_recipe
from ..decoding.policy import Tuning, policy_of
from ..head.flash_head import FlashHead
from ..head.matrix import Matrix
from ..models.errors import UnsupportedHeadError
from ..models.fetch import HOME_VARIABLE, home
from ..models.install import get_flash_head
from ..models.locate import HeadLocation, check_plain_product, find_head
from ..models.origin import local_origin
from ..models.vlm import text_side
from . import sources
from .head_options import HeadOptions
from .sources import StoredHead
from .tuned import apply_tuning, install_stored, tune_head
from .use import Use

# A first build that may take longer, as on a busy machine, is a shorter one (docs/converting.md).
LONG_BUILD_SECONDS = 300.0
POLL_SECONDS = 0.05  # how often it is asked whether a model is idle
QUIET_SECONDS = 0.5  # for which another program must have written nothing


def build_steps(
    model: nn.Module,
    tokenizer: Any,
    location: HeadLocation,
    *,
    source: Path,
    options: HeadOptions,
    anew: bool = False,
    step_seconds: float = math.inf,
) -> Task[StoredHead]:
    """Builds a FlashHead in short parts, or waits for another process that builds it.

    A build that is dropped between two parts leaves nothing behind.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or its processor.
        location: Its head.
        source: Its folder, which names it.
        options: How the model gets its FlashHead.
        anew: Replace a FlashHead that there is, and take more time.
        step_seconds: About how long the model works at once.

    Returns:
        The FlashHead.

    Raises:
        ValueError: In one of the parts, if the model cannot have one.
    """
    rows = location.rows()
    place = sources.place_of(rows)
    lock = yield from _locked(place, options)
    try:
        stored = None if anew else sources.find(rows, lambda _: None)
        if stored is not None:
            return stored
        how = _index_options(rows, anew=anew)
        how.check_size(rows.n_rows)
        origin = local_origin(source)
        minutes = max(1, math.ceil(round(expected_seconds(rows, how)) / 60))
        duration = "a minute" if minutes == 1 else f"{minutes} minutes"
        when = "" if step_seconds == math.inf else " while the model is idle"
        options.say(
            f"Building the FlashHead of {origin.known_as}{when}, which takes at most about "
            f"{duration}. It is kept in {place}."
        )
        yield Progress("", 0, 0, "")  # what is said comes before what takes time
        del rows
        recipe = make_recipe(how, origin, origin.result_name())
        index = yield from model_index(
            model,
            text_side(model, tokenizer),
            location,
            how,
            step_seconds=step_seconds,
        )
        index = replace(index, config=replace(index.config, recipe=recipe))
        if index.config.calibration.get("cut_short"):
            n_positions = index.config.calibration["positions"]
            options.say(
                f"This machine was busy, so the build was cut short, after {n_positions:,} "
                "positions: mlx_flashhead.cache --rebuild MODEL makes a faster one."
            )
        try:
            sources.keep(index, place)
        except OSError as error:
            reason = error.strerror or error
            options.say(
                f"It is not kept, since {home()} cannot be written ({reason}): set {HOME_VARIABLE} "
                "to another place, or it is built again next time."
            )
        return StoredHead(index, str(place))
    finally:
        if lock is not None:
            lock.release()


def _locked(place: Path, options: HeadOptions) -> Task[BaseFileLock | None]:
    """Waits for the lock of a FlashHead's place; None if nothing can be cached there."""
    file = home() / "locks" / f"{place.name}.lock"
    lock = FileLock(file)
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
        yield Progress("Waiting for the other process", 0, 1, "build")
        with suppress(Timeout):
            lock.acquire(timeout=0)
    return lock


def _index_options(rows: Matrix, *, anew: bool) -> IndexOptions:
    """How an index is made at the first use of a model, or anew."""
    how = IndexOptions(quick=True)
    if anew:
        return replace(how, calibration_seconds=600.0)  # all of its text on a busy machine, too
    if expected_seconds(rows, how) > LONG_BUILD_SECONDS:
        return replace(how, cluster_size=32, calibration_positions=800, calibration_seconds=30.0)
    return how


def finish(task: Task[StoredHead], options: HeadOptions) -> StoredHead:
    """Does all parts of a build that are left, with bars.

    Args:
        task: The build.
        options: How the model gets its FlashHead.
    """
    with redirect_stdout(sys.stderr):  # standard output is the command's own
        return run_task(task, progress=options.progress)


def build_now(
    model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, *, anew: bool = False
) -> StoredHead:
    """Builds and installs a FlashHead, and says what it took.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or its processor.
        source: Its folder, which names it.
        options: How the model gets its FlashHead.
        anew: Replace a FlashHead that there is, and take more time.

    Returns:
        The FlashHead. Its source is a folder that is not there if it could not be kept.

    Raises:
        ValueError: If the model cannot have one.
    """
    began = time.perf_counter()
    location = find_head(model)
    check_plain_product(location)
    task = build_steps(model, tokenizer, location, source=source, options=options, anew=anew)
    stored = finish(task, options)
    seconds = time.perf_counter() - began
    policy = policy_of(install_stored(model, stored, options, location))  # it says what it gains
    if not policy.dense:
        options.say(f"FlashHead is ready for next time. Its build took {seconds:.0f} s.")
    return stored


class BackgroundBuild:
    """A FlashHead that is built in short parts, installed between two tokens, and measured.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: Its folder, which names it.
        options: How the model gets its FlashHead.

    Raises:
        UnsupportedHeadError: If the model cannot have one.
    """

    stored: StoredHead | None = None  # once it is built
    tuning: Tuning | None = None  # once it is measured

    def __init__(self, model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions):
        location = find_head(model)
        check_plain_product(location)
        build = build_steps(
            model,
            tokenizer,
            location,
            source=source,
            options=options,
            step_seconds=STEP_SECONDS,
        )
        self._steps = self._all_steps(model, build, options)

    def _all_steps(
        self, model: nn.Module, build: Task[StoredHead], options: HeadOptions
    ) -> Generator[Any, None, None]:
        self.stored = yield from build
        yield
        if get_flash_head(model) is None:
            install_stored(model, self.stored, replace(options, tunes=False))
            yield
            self.tuning = yield from tune_head(model, self.stored.index, options)

    def advance(self) -> bool:
        """Does a part of the work.

        Returns:
            Whether there was one left.

        Raises:
            ValueError: If the model cannot have a FlashHead.
        """
        ended = object()
        return next(self._steps, ended) is not ended

    def drop(self) -> None:
        """Ends the build, which lets the model go, and leaves nothing behind."""
        self._steps.close()


class IdleBuild:
    """Builds a FlashHead in a thread while a model is idle, on a copy of the model.

    The copy shares the model's arrays. No call of the model meets a part of the build.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: Its folder, which names it.
        options: How the model gets its FlashHead.

    Raises:
        UnsupportedHeadError: If the model cannot have one.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions):
        self._options = options
        self._build = BackgroundBuild(copy.deepcopy(model), tokenizer, source, options)
        self._build.advance()  # which says how long it takes
        self._in_use = False
        self._closed = False  # nothing is built, or taken over, any more
        self._thread = Thread(target=self._run, name="build", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    @property
    def is_building(self) -> bool:
        """Whether the model will have the FlashHead later."""
        is_there = self._build.stored is not None and not self._closed
        return is_there or self._thread.is_alive()

    @contextmanager
    def paused(self, model: nn.Module) -> Iterator[None]:
        """A block in which the model is used, with its FlashHead if that is built."""
        self._in_use = True
        try:
            self.take_over(model)
            yield
        finally:
            self._in_use = False

    def take_over(self, model: nn.Module) -> FlashHead | None:
        """Puts what was built and measured on the model itself; None if there is nothing yet."""
        stored = self._build.stored
        if self._thread.is_alive() or self._closed or stored is None:
            return None
        self._closed = True
        head = install_stored(model, stored, replace(self._options, tunes=False))
        if self._build.tuning is not None:
            apply_tuning(model, self._build.tuning, self._options)
        return head

    def close(self) -> None:
        """Ends the build after the part that is being done."""
        self._closed = True

    def _end(self) -> None:
        """At the end of the process, before which MLX must be at rest."""
        self.close()
        self._thread.join()

    def _may_advance(self) -> bool:
        return not self._in_use

    def _run(self) -> None:
        try:
            more = True
            while more and not self._closed:
                if self._may_advance():
                    more = self._build.advance()
                else:
                    time.sleep(POLL_SECONDS)
        except Exception as error:  # whatever it is, the model goes on with its normal head
            self._options.say(f"Without FlashHead: {sentence(error)}")
        finally:
            self._build.drop()
            mx.clear_streams()  # which must go before their thread ends


Build = TypeVar("Build", BackgroundBuild, IdleBuild)


def background_build(
    model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, kind: type[Build]
) -> Build | None:
    """The build for a model that has no FlashHead; None if it has one or can have none.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: Its folder, which names it.
        options: How the model gets its FlashHead, and where it is said that it can have none.
        kind: Who advances the build.
    """
    if get_flash_head(model) is not None:
        return None
    try:
        return kind(model, tokenizer, source, options)
    except UnsupportedHeadError as error:
        options.say(f"Without FlashHead: {error}")
        return None


class BuildBeside(IdleBuild):
    """An :class:`IdleBuild` of a model that another program uses.

    Parts are done while the program writes nothing. When the process ends, what is left of the
    build is done at a terminal.

    Args:
        use: Says what there is to say, and knows when the program has used the model.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, use: Use
    ):
        self.use = use
        self._ends = False  # with the process: what is built is kept, and nothing is measured
        super().__init__(model, tokenizer, source, replace(options, tell=use.say))

    def _may_advance(self) -> bool:
        self._closed = self._closed or (self._ends and self._build.stored is not None)
        quiet = time.monotonic() - self.use.used_at > QUIET_SECONDS
        return not self._closed and (self._ends or quiet)

    def _end(self) -> None:
        """A program that ends by an error, or by Ctrl-C, ends the build, too."""
        if self._closed or not self._thread.is_alive():
            return super()._end()
        at_terminal = sys.stderr.isatty()
        self._closed = not at_terminal or hasattr(sys, "last_type")
        self._ends = True
        try:
            if not self._closed:
                self.use.say("Preparing FlashHead for next time. Ctrl-C skips it.", at_once=True)
            self._thread.join()
        except KeyboardInterrupt:
            self._closed = True
            self.use.say("Skipped. The next use tries again.", at_once=True)
            self._thread.join()
        if self._build.stored is not None:
            self.use.say("FlashHead is ready for next time.", at_once=True)
        elif not at_terminal:  # a script waits for its end
            self.use.say(
                "FlashHead is not built yet: --build-first builds it before the first text, and "
                "`mlx_flashhead.cache --build MODEL` now."
            )
