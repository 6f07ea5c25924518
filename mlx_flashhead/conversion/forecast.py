"""How much of a build is done, and how long the rest of it takes."""

from collections.abc import Mapping
from typing import NamedTuple

from . import Progress


class Forecast(NamedTuple):
    """What is left of a build, at one moment.

    Attributes:
        share: The share of its time that is done, 0 to 1.
        seconds_left: The time that is left.
    """

    share: float
    seconds_left: float


class Forecaster:
    """Follows a build, stage by stage.

    The stage at hand goes on at the pace that it has had. A later one takes as long as was
    expected.

    Args:
        expected: Seconds of each stage, by its name, in their order. A stage that is not named
            takes no time.
        limit: Seconds after which the first stage ends, whatever is left of it.
    """

    def __init__(self, expected: Mapping[str, float], limit: float):
        self._seconds = dict(expected)
        # The share of each stage that is done.
        self._shares = dict.fromkeys(expected, 0.0)
        self._limit = limit
        # The greatest share that was said: a bar does not go back.
        self._most = 0.0
        # The stage at hand, its seconds in this build, and its units. Of these, some may have been
        # done by an earlier build.
        self._stage = ""
        self._spent = 0.0
        self._n_done = 0
        self._n_kept = 0

    def note(self, progress: Progress, seconds: float) -> None:
        """Notes a part of the build, and the seconds that it took."""
        stage, added, total, kept = progress
        if stage not in self._seconds:
            return
        if stage != self._stage:
            self._begin(stage)
        self._spent += seconds
        self._n_done += added
        if kept:
            self._n_kept += added
        n_own = self._n_done - self._n_kept
        if n_own:
            self._seconds[stage] = self._spent * total / n_own
        share = min(self._n_done / max(total, 1), 1.0)
        if stage == next(iter(self._seconds)) and self._seconds[stage] > self._limit:
            share = min(self._spent / self._limit, 1.0)
            self._seconds[stage] = self._limit
        self._shares[stage] = share

    def _begin(self, stage: str) -> None:
        for earlier in self._shares:
            if earlier == stage:
                break
            self._shares[earlier] = 1.0
        self._stage = stage
        self._spent = 0.0
        self._n_done = 0
        self._n_kept = 0

    @property
    def forecast(self) -> Forecast:
        """What is left now."""
        total = sum(self._seconds.values())
        left = sum(seconds * (1 - self._shares[name]) for name, seconds in self._seconds.items())
        self._most = max(self._most, 1 - left / max(total, 1e-9))
        return Forecast(self._most, left)
