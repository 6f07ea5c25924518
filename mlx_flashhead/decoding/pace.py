"""Whether proposals pay in the text at hand.

A flat distribution, or text that is unlike what the machine was measured on, costs more doubts and
rejections than the proposals save.
"""

from dataclasses import dataclass, field
from statistics import median

MOST_LOST = 6  # tokens' time of dense decoding that proposals may lose
MOST_GAINED = 16  # tokens' time that proposals have gained and may lose later, at the most
UNKNOWN = 24  # rounds of proposals after which dense ones are timed, if no time of theirs is known
WARM = 2  # dense rounds after a change, which are not timed
TIMED = 12  # dense rounds after these, whose median is the time of a dense token
# Tokens that are decoded densely once proposals have lost too much; each next time four times as
# many.
DENSE_TOKENS = 32
MOST_DENSE = 4096


@dataclass
class Pace:
    """The pace of one kind of text, greedy or sampled, of one head. It outlives a text.

    What proposals gain and lose is added up, in tokens that dense decoding would have made in the
    same time. Once they have lost too much, some tokens are decoded densely. These are timed, since
    the machine may have become slower, and proposals are tried again: more of them follow if those
    lose too much again.

    Args:
        dense_seconds: Seconds of a round of dense decoding, where it was measured for one text.
    """

    dense_seconds: float | None = None
    dense_left: int = 0  # tokens that are still decoded densely
    _next_dense: int = DENSE_TOKENS
    _gained: float = 0.0  # tokens, by the latest rounds of proposals
    _n_rounds: int = 0  # of proposals since dense ones
    _dense_times: list[float] = field(default_factory=list)

    @property
    def dense(self) -> bool:
        """Whether the next tokens are to be decoded densely."""
        return self.dense_left > 0

    def note_dense(self, seconds: float) -> None:
        """Notes a round in which all texts were decoded densely."""
        self.dense_left = max(self.dense_left - 1, 0)
        if len(self._dense_times) < WARM + TIMED:
            self._dense_times.append(seconds)
            if len(self._dense_times) == WARM + TIMED:
                self.dense_seconds = median(self._dense_times[WARM:])

    def note_proposed(self, seconds: float, n_tokens: float, verified: bool) -> None:
        """Notes a round of proposals.

        Args:
            seconds: Its time.
            n_tokens: By how many tokens each text, with its pending ones, has grown: 1, or less
                than 0 where proposals were rejected.
            verified: Whether it ended with a verification: then it is known what was gained.
        """
        self._n_rounds += 1
        if self.dense_seconds is None:
            if verified and self._n_rounds >= UNKNOWN:
                self._go_on_densely(WARM + TIMED)
            return
        self._gained += n_tokens - seconds / self.dense_seconds
        if not verified:
            return
        if self._gained < -MOST_LOST:
            self._go_on_densely(self._next_dense)
            self._next_dense = min(4 * self._next_dense, MOST_DENSE)
        elif self._gained > MOST_GAINED:
            self._gained = MOST_GAINED
            self._next_dense = DENSE_TOKENS

    def _go_on_densely(self, n_tokens: int) -> None:
        self.dense_left = n_tokens
        self._gained = 0.0
        self._n_rounds = 0
        self._dense_times = []
