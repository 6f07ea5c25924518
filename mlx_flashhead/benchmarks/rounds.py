"""The rounds of a benchmark: forms that are timed in turns, one case after the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..common.timing import in_turns


@dataclass(frozen=True)
class Round:
    """What is known after ``done`` of ``total`` rounds: news in a few words, and all figures."""

    done: int
    total: int
    news: str
    results: list[dict]

    def line(self, seconds: float) -> str:
        """Shown after so many seconds of rounds, with the time that is left."""
        if not self.done:
            return f"[{self.total} rounds] {self.news}"
        left = seconds / self.done * (self.total - self.done)
        duration = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        return f"[{self.done} of {self.total}, {duration} left] {self.news}"


@dataclass(frozen=True)
class Case:
    """Forms that are timed in turns: by name, functions of the round's number that return seconds.

    ``figures`` makes those of the seconds by form.
    """

    name: str
    timers: Mapping[str, Callable[[int], float]]
    figures: Callable[[dict[str, list[float]]], dict]


def time_cases(cases: Iterable[Case], n_cases: int, rounds: int) -> Iterator[Round]:
    """Times one case after the other."""
    finished: list[dict] = []
    done, total = 0, n_cases * (rounds + 1)
    for case in cases:
        if not done:
            yield Round(0, total, f"{case.name}: {', '.join(case.timers)}", [])
        results, news = finished, "warm"
        for seconds in in_turns(case.timers, rounds):
            done += 1
            if all(seconds.values()):
                results = [*finished, case.figures(seconds)]
                latest = (f"{form} {1000 * times[-1]:.2f}" for form, times in seconds.items())
                news = f"{', '.join(latest)} ms"
            yield Round(done, total, f"{case.name}: {news}", results)
        finished = results
