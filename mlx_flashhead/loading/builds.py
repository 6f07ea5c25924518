"""Builds of FlashHeads, beside the use of their models or not: a thread, and a gate.

The model answers with its normal (dense) head until the FlashHead is there: verified text does not
depend on it. `build_parts.py` has what is done, part by part.
"""

import atexit
import copy
import math
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..common.command import sentence
from ..common.yielding import one_thread_less, yielding
from ..conversion import Progress, Task
from ..conversion.build import STEP_SECONDS
from ..conversion.forecast import Forecast, Forecaster
from ..decoding.policy import Tuning, policy_of
from ..head.flash_head import FlashHead
from ..models.errors import UnsupportedHeadError
from ..models.install import get_flash_head
from ..models.locate import check_plain_product, find_head
from .build_parts import build_parts
from .head_options import HeadOptions
from .installing import install_stored
from .sources import StoredHead
from .tuned import apply_tuning, tune_head

# A closed gate is asked again after so long.
POLL_SECONDS = 0.05
# So long a bar shows the same.
SHOWN_SECONDS = 0.2
PREPARING = "Preparing FlashHead for next time. Ctrl-C leaves, and it goes on next time."
LEFT = "FlashHead is not built yet. Its build goes on next time."

Gate = Callable[[], bool]


def always() -> bool:
    """The gate of a build that nothing stands beside."""
    return True


class Build:
    """Builds a FlashHead in a thread while a gate is open, on a copy of the model, and measures it.

    The copy shares the model's arrays. No call of the model meets a part of the build. What a build
    has computed that does not end is kept for the next one.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or its processor.
        source: Its folder, which names it.
        options: How the model gets its FlashHead, and where it is said what is done.
        gate: Whether the next part may be done; None: they are done one after the other, without
            regard to other work, and nothing is measured.
        anew: Replace a FlashHead that there is, and take more time.

    Attributes:
        gate: Whether the next part may be done. A caller may put another one here.
        stored: The FlashHead, once it is built.
        tuning: What it gains, once that is measured.
        error: What has ended the build.
        closed: Whether nothing is built, or taken over, any more.

    Raises:
        UnsupportedHeadError: If the model cannot have one.
    """

    stored: StoredHead | None = None
    tuning: Tuning | None = None
    error: BaseException | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        source: Path,
        options: HeadOptions,
        gate: Gate | None = None,
        *,
        anew: bool = False,
    ):
        # Another thread has no part of their computation.
        mx.eval(model.parameters())
        copied = copy.deepcopy(model)
        location = find_head(copied)
        check_plain_product(location)
        self.gate = always
        self._measures = gate is not None
        self._options = options
        self._forecaster: Forecaster | None = None
        self.closed = False
        step_seconds = math.inf
        if gate is not None:
            self.gate = gate
            step_seconds = STEP_SECONDS
        parts = build_parts(
            copied,
            tokenizer,
            location,
            source=source,
            options=options,
            follow=self._follow,
            anew=anew,
            step_seconds=step_seconds,
        )
        self._parts = self._all_parts(copied, parts, options)
        del copied, location, parts
        # The first part says how long the build takes.
        self._more = self._advance()
        self._thread = Thread(target=self._run, name="build", daemon=True)
        self._thread.start()
        # MLX must be at rest when the process ends.
        atexit.register(self.leave)

    def _follow(self, forecaster: Forecaster) -> None:
        self._forecaster = forecaster

    def _all_parts(
        self, model: nn.Module, parts: Task[StoredHead], options: HeadOptions
    ) -> Generator[Progress | None, None, None]:
        """The parts of the build, and those that measure what it gains, which have no progress."""
        self.stored = yield from parts
        self._forecaster = None
        if not self._measures:
            return
        yield None
        install_stored(model, self.stored, replace(options, tunes=False))
        yield None
        self.tuning = yield from tune_head(model, self.stored.index, options)

    def _advance(self) -> bool:
        """Does a part of the work. Returns whether there may be another one."""
        began = time.monotonic()
        try:
            progress = next(self._parts)
        except StopIteration:
            return False
        if self._forecaster is not None and progress is not None:
            self._forecaster.note(progress, time.monotonic() - began)
        return True

    def _run(self) -> None:
        try:
            with yielding():
                while self.stored is None and self._may_go_on():
                    self._build_part()
            # A speed is measured as a text is written: it does not yield.
            while self._may_go_on():
                self._more = self._advance()
        except BaseException as error:
            # Whatever it is, the model goes on with its normal head.
            self.error = error
            if self._measures:
                self._options.say(f"Without FlashHead: {sentence(error)}")
        finally:
            # This lets the copy of the model go.
            self._parts.close()
            # The streams of MLX must go before their thread ends.
            mx.clear_streams()

    def _may_go_on(self) -> bool:
        """Waits for the gate. Returns whether there is another part."""
        while self._more and not self.closed:
            if self.gate():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _build_part(self) -> None:
        """Does a part of the build, and leaves a processor to those who wait for nothing of it."""
        if not self._measures:
            self._more = self._advance()
            return
        with one_thread_less():
            self._more = self._advance()

    @property
    def has_ended(self) -> bool:
        """Whether all of it is done, or it has failed."""
        return not self._thread.is_alive()

    @property
    def under_way(self) -> bool:
        """Whether the model will have the FlashHead later."""
        is_there = self.stored is not None and not self.closed
        return is_there or not self.has_ended

    @property
    def forecast(self) -> Forecast | None:
        """What is left of the build; None if that is not known, as while its speed is measured."""
        forecaster = self._forecaster
        if forecaster is None:
            return None
        return forecaster.forecast

    def take_over(self, model: nn.Module) -> FlashHead | None:
        """Puts what was built and measured on the model itself; None if there is nothing yet."""
        if not self.has_ended or self.closed or self.stored is None:
            return None
        self.closed = True
        head = install_stored(model, self.stored, replace(self._options, tunes=False))
        if self.tuning is not None:
            apply_tuning(model, self.tuning, self._options)
        return head

    def close(self) -> None:
        """Ends the build after the part that is being done."""
        self.closed = True

    def leave(self) -> None:
        """Ends the build, and waits for that."""
        atexit.unregister(self.leave)
        self.close()
        self._thread.join()

    def wait(self) -> StoredHead:
        """Waits for the end of the build, with a bar.

        Returns:
            The FlashHead.

        Raises:
            ValueError: If the model cannot have one.
            KeyboardInterrupt: At Ctrl-C, after which the build is left.
        """
        self.gate = always
        self._measures = False
        form = "FlashHead: {percentage:3.0f}%|{bar:40}| {desc}"
        hidden = not self._options.progress
        try:
            with tqdm(total=1.0, bar_format=form, disable=hidden) as bar:
                while self._thread.is_alive():
                    self._thread.join(SHOWN_SECONDS)
                    forecast = self.forecast
                    if forecast is not None:
                        bar.n = forecast.share
                        bar.set_description_str(time_left(forecast))
                bar.set_description_str("")
                if self.stored is not None:
                    bar.n = 1.0
                bar.refresh()
        except BaseException:
            self.leave()
            raise
        atexit.unregister(self.leave)
        if self.error is not None:
            raise self.error
        # A build that has no error has a FlashHead.
        assert self.stored is not None
        return self.stored


def time_left(forecast: Forecast) -> str:
    """Says how long a build takes, such as "about 40 s left"."""
    seconds = forecast.seconds_left
    if seconds < 10:
        return "a few seconds left"
    if seconds < 90:
        return f"about {round(seconds, -1):.0f} s left"
    return f"about {round(seconds / 60)} min left"


def build_beside(
    model: nn.Module, tokenizer: Any, source: Path, options: HeadOptions, gate: Gate = always
) -> Build | None:
    """The build for a model that has no FlashHead; None if it has one or can have none.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: Its folder, which names it.
        options: How the model gets its FlashHead, and where it is said that it can have none.
        gate: Whether the next part may be done.
    """
    if get_flash_head(model) is not None:
        return None
    try:
        return Build(model, tokenizer, source, options, gate)
    except UnsupportedHeadError as error:
        options.say(f"Without FlashHead: {error}")
        return None


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
    stored = Build(model, tokenizer, source, options, anew=anew).wait()
    seconds = time.perf_counter() - began
    # What the FlashHead gains is said here.
    policy = policy_of(install_stored(model, stored, options))
    if not policy.dense:
        options.say(f"FlashHead is ready for next time. Its build took {seconds:.0f} s.")
    return stored
