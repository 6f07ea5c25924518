"""Whether proposals pay in the text at hand.

A flat distribution, or text that is unlike what the machine was measured on, costs more doubts and
rejections than the proposals save.
"""

import math
from dataclasses import dataclass, field

FIRST_ROUNDS = 8  # rounds of a trial before it is judged
TRIAL = 24  # rounds of a trial after which it has passed
CHANCE = 4  # tokens' time that a shorter trial may lose: one rejection says little
WARM = 2  # dense rounds after a change, which are not timed
# Tokens that are decoded densely after a trial that failed; each next time three times as many.
DENSE_TOKENS = 96
MOST_DENSE = 4096
MEASURED = 12  # dense rounds whose times say how long a token takes
ENOUGH = 4  # so many do if they are slower than the trial was
LOST = 0.15  # share of rounds that gave no token, from which dense ones are timed
SLOWER = 1.02  # time of a token relative to dense decoding, above which a trial fails


@dataclass
class Pace:
    """The pace of one kind of text, greedy or sampled, of one head. It outlives a text.

    Rounds of proposals are a trial: as long as they give tokens as fast as dense ones, they go on.
    Where they do not, a few tokens are decoded densely and timed, since the machine may have become
    slower. If these are faster indeed, more of them follow, and then there is another trial.

    Args:
        dense_seconds: Seconds of a round of dense decoding, where it was measured for one text.
    """

    dense_seconds: float | None = None
    dense_left: int = 0  # tokens that are still decoded densely
    _next_dense: int = DENSE_TOKENS
    _rounds: int = 0  # of the trial
    _seconds: float = 0.0  # of these
    _tokens: float = 0.0  # that these gave, to each text
    _dense_times: list[float] = field(default_factory=list)
    _warm: int = 0
    _lost: float | None = None  # seconds a token of a trial that dense rounds are timed against

    @property
    def dense(self) -> bool:
        """Whether the next tokens are to be decoded densely."""
        return self.dense_left > 0

    def note_dense(self, seconds: float) -> None:
        """Notes a round in which all texts were decoded densely."""
        self.dense_left = max(self.dense_left - 1, 0)
        self._warm += 1
        if self._warm > WARM:
            self._dense_times = [*self._dense_times[1 - MEASURED :], seconds]
            ordered = sorted(self._dense_times)
            self.dense_seconds = ordered[len(ordered) // 2]
        if self._lost is not None:
            self._compare(self._lost)
        self._begin_trial()

    def note_proposed(self, seconds: float, n_tokens: float, verified: bool) -> None:
        """Notes a round of proposals.

        Args:
            seconds: Its time.
            n_tokens: By how many tokens each text, with its pending ones, has grown: 1, or less
                than 0 where proposals were rejected.
            verified: Whether it ended with a verification: then it is known what the trial gave.
        """
        self._warm = 0
        self._rounds += 1
        self._seconds += seconds
        self._tokens += n_tokens
        if not verified or self._rounds < FIRST_ROUNDS:
            return
        chance = CHANCE if self._rounds < TRIAL else 0
        if self.dense_seconds is None:  # dense rounds are timed, at once if tokens are lost
            if self._rounds >= TRIAL or self._tokens + chance < (1 - LOST) * self._rounds:
                self._time_dense()
        elif self._seconds > self.dense_seconds * (SLOWER * self._tokens + chance):
            self._time_dense()
        elif self._rounds >= TRIAL:
            self._next_dense = DENSE_TOKENS
            self._begin_trial()

    def _time_dense(self) -> None:
        self._lost = self._seconds / self._tokens if self._tokens > 0 else math.inf
        self._dense_times = []
        self.dense_left = MEASURED + WARM
        self._begin_trial()

    def _compare(self, lost: float) -> None:
        """Ends the dense tokens that are timed, or has more of them follow, once that is decided.

        Args:
            lost: Seconds a token of the trial that failed.
        """
        slower = self.dense_seconds is not None and lost <= SLOWER * self.dense_seconds
        if slower and len(self._dense_times) >= ENOUGH:
            self.dense_left = 0
        if self.dense_left:
            return
        self._lost = None
        if not slower:
            self.dense_left = self._next_dense
            self._next_dense = min(3 * self._next_dense, MOST_DENSE)

    def _begin_trial(self) -> None:
        self._rounds = 0
        self._seconds = 0.0
        self._tokens = 0.0
