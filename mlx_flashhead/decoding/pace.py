"""Whether proposals pay in the text at hand.

A flat distribution, or text that is unlike what the machine was measured on, costs more doubts and
rejections than the proposals save.
"""

from dataclasses import dataclass, field
from statistics import median

# Tokens' time of dense decoding that proposals may lose, and the most of what they have gained that
# they may lose later.
MOST_LOST = 6
MOST_GAINED = 16
# Rounds of proposals after which dense ones are timed, if no time of theirs is known.
UNKNOWN = 24
# The first dense rounds after a change are not timed. The median of the next ones is the time of a
# dense token.
WARM = 2
TIMED = 12
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
        dense_seconds: Seconds of work (``clock.now``) of a round of dense decoding, where it was
            measured for one text.
        dense_left: Tokens that are still decoded densely.
    """

    dense_seconds: float | None = None
    dense_left: int = 0
    _next_dense: int = DENSE_TOKENS
    # The tokens that the latest rounds of proposals have gained, and how many rounds these are.
    _gained: float = 0.0
    _n_rounds: int = 0
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
