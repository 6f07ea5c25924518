"""Whether and how far a text is guessed ahead: as far as gives most tokens for their time.

It is asked for every guesser: lookups, draft models and trained drafters.

    gain(T) = (1 + p1 + p1 p2 + … + p1 … p(T-1))
              / (cost(T) + (T - 1) draft + (1 - p1 … p(T-1)) wrong)

pd is the chance that guess d is right if those before it are, learned in the text from what is
expected before: of a drafter that is what earlier texts have shown. Nothing here knows a model:
times are relative to a single step, and a step of T tokens has T - 1 guesses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple

from ...wide.step import MAX_WIDTH

MAX_GUESSES = MAX_WIDTH - 1
# A wide step is taken if it gives more tokens than this in the time of a single one.
WORTH = 1.05

# The share of guesses that are right where nothing is known, and as how many guesses it counts.
EXPECTED = 0.6
EXPECTED_WEIGHT = 2.0
# As how many guesses of a text that counts which is known from earlier texts.
PRIOR_WEIGHT = 8.0
# What each step with a guess leaves of what is known of a text.
KEPT = 0.98
# Guesses of earlier texts that are remembered, at each depth.
MOST_KNOWN = 400.0

# Where guesses do not pay they may cost this part of the time of single steps: 2 % with the tries,
# which cost the other part.
BOUND = 0.018
TRIES = 0.01
# Single steps that guesses may lose before they have gained anything: those of a drafter once on a
# machine, lookups once a text.
START = 2.0
# Single steps that were gained, and may be lost again, at the most.
MOST_SLACK = 12.0


class Costs(NamedTuple):
    """Times relative to a single step.

    Attributes:
        times: Of a step, by its number of tokens.
        draft: Of each guess.
        wrong: Of what a step with a wrong guess takes more, to bring the caches back.
    """

    times: Mapping[int, float]
    draft: float = 0.0
    wrong: float = 0.0

    def time(self, width: int, wrong: float = 1.0) -> float:
        """The time of a step with its guesses.

        Args:
            width: Its tokens.
            wrong: The chance that one of its guesses is wrong.
        """
        if width == 1:
            return 1.0
        return self.times[width] + (width - 1) * self.draft + wrong * self.wrong


def gain(width: int, chances: Sequence[float], costs: Costs) -> float:
    """The tokens that a step is expected to give in the time of a single one.

    Args:
        width: Its tokens, 2 or more.
        chances: Of each guess to be right if those before it are.
        costs: The times.
    """
    reached: list[float] = list(accumulate(chances[: width - 1], mul))
    return (1 + sum(reached)) / costs.time(width, 1 - reached[-1])


def best_width(chances: Sequence[float], costs: Costs) -> int:
    """The tokens of the step that gives most for its time; 1 where a single step is as good.

    Args:
        chances: As of :func:`gain`. There are no wider steps than these reach.
        costs: The times.
    """
    widths = [width for width in costs.times if width <= len(chances) + 1]
    best = max(widths, key=lambda width: gain(width, chances, costs), default=1)
    if best > 1 and gain(best, chances, costs) > WORTH:
        return best
    return 1


def _no_guesses() -> list[float]:
    return [0.0] * MAX_GUESSES


@dataclass
class Known:
    """What is known of a drafter and its target, from text to text on this machine.

    Attributes:
        right: Guesses of each depth that were right.
        tried: Guesses of each depth of which all before it were right.
        slack: Single steps that guesses may take beyond what they gain.
    """

    right: list[float] = field(default_factory=_no_guesses)
    tried: list[float] = field(default_factory=_no_guesses)
    slack: float = START

    @property
    def shares(self) -> list[float]:
        """The chance of each guess; a depth of which little is known has that of the one before."""
        return _shares(self.right, self.tried, [1.0] * MAX_GUESSES, EXPECTED, EXPECTED_WEIGHT)

    def add(self, right: Iterable[float], tried: Iterable[float]) -> None:
        """Adds the guesses of a text. The latest ones count most."""
        self.right = [a + b for a, b in zip(self.right, right, strict=True)]
        self.tried = [a + b for a, b in zip(self.tried, tried, strict=True)]
        for depth, number in enumerate(self.tried):
            if number > MOST_KNOWN:
                self.right[depth] *= MOST_KNOWN / number
                self.tried[depth] = MOST_KNOWN


class Shares:
    """How often the guesses of each depth are right in a text.

    Args:
        prior: What is expected of each depth.
        weight: As how many guesses of the text that counts.
    """

    def __init__(self, prior: Sequence[float], weight: float = PRIOR_WEIGHT):
        self._first = prior[0]
        self._weight = weight
        self._ratios = [1.0, *(after / before for before, after in pairwise(prior))]
        # Of these the latest ones count most.
        self._right = _no_guesses()
        self._tried = _no_guesses()
        self._all_right = _no_guesses()
        self._all_tried = _no_guesses()

    @property
    def chances(self) -> list[float]:
        """The chance of each guess to be right if those before it are.

        A depth that was seldom reached follows the one before it, as it did in earlier texts.
        """
        return _shares(self._right, self._tried, self._ratios, self._first, self._weight)

    def note(self, n: int, n_right: int) -> None:
        """Notes how many of ``n`` guesses were right, up to a wrong one."""
        self._right = [KEPT * number for number in self._right]
        self._tried = [KEPT * number for number in self._tried]
        for depth in range(min(n_right + 1, n)):
            right = float(depth < n_right)
            self._right[depth] += right
            self._tried[depth] += 1
            self._all_right[depth] += right
            self._all_tried[depth] += 1

    def leave_to(self, known: Known) -> None:
        """Adds what the text has shown to what is known."""
        known.add(self._all_right, self._all_tried)
        self._all_right = _no_guesses()
        self._all_tried = _no_guesses()


class Budget:
    """Chooses the width of each step of a text, and bounds what guesses may lose.

    Where no width pays, steps are single, and the one that loses least is tried now and then. All
    that guesses lose is bounded: by BOUND of the time, beside START and a part of what they have
    gained.

    Args:
        known: Has the slack, which is kept up to date.
    """

    def __init__(self, known: Known):
        self._known = known
        # Steps since the latest guess.
        self._n_single = 0

    def width(self, chances: Sequence[float], costs: Costs) -> int:
        """The tokens of the next step; 1 for a single one.

        Args:
            chances: Of each guess to be right if those before it are.
            costs: The times of steps from these caches on.
        """
        affordable = self.affordable(costs)
        width = best_width(chances, affordable)
        if width == 1:
            return self.tried(chances, affordable)
        return width

    def affordable(self, costs: Costs) -> Costs:
        """The costs of those steps that may be taken even if all of their guesses are wrong."""
        slack = self._known.slack
        times = {w: time for w, time in costs.times.items() if costs.time(w) - 1 <= slack}
        return costs._replace(times=times)

    def note(self, width: int, costs: Costs, n_right: int = 0) -> None:
        """Notes a step.

        Args:
            width: Its tokens.
            costs: Those by which it was chosen.
            n_right: How many of its guesses were right.
        """
        time = costs.time(width, float(n_right < width - 1))
        slack = self._known.slack + (1 + BOUND) * (1 + n_right) - time
        self._known.slack = min(slack, MOST_SLACK)
        self._n_single += 1
        if width > 1:
            self._n_single = 0

    def tried(self, chances: Sequence[float], costs: Costs) -> int:
        """The width that is expected to lose least, if it is time to try it; else 1.

        A width that would not pay if all guesses were right is never tried.

        Args:
            chances: Of guesses that do not pay.
            costs: Those that are affordable.
        """
        all_right = [1.0] * MAX_GUESSES
        losses = {
            width: costs.time(width) * (1 - gain(width, chances, costs))
            for width in costs.times
            if width <= len(chances) + 1 and gain(width, all_right, costs) > WORTH
        }
        width = min(losses, key=lambda width: losses[width], default=1)
        if losses and losses[width] <= TRIES * self._n_single:
            return width
        return 1


def _shares(
    right: Sequence[float],
    tried: Sequence[float],
    ratios: Sequence[float],
    first: float,
    weight: float,
) -> list[float]:
    """Shares of each depth, where each begins with that of the one before times a ratio."""
    shares: list[float] = []
    expected = first
    for of_right, of_tried, ratio in zip(right, tried, ratios, strict=True):
        expected = min(expected * ratio, 1.0)
        expected = (of_right + weight * expected) / (of_tried + weight)
        shares.append(expected)
    return shares
