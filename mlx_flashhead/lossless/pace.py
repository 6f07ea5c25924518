"""When to check: by the risk that has gathered, the number of tokens and the time they wait."""

import time

from ..head.flash_head import MOST_WAITING

MOST_RISK = 0.03
MOST_SECONDS = 0.1
FEW = 4  # tokens that may wait longer, on a machine that is slow to compute them


class Pace:
    """Decides when the tokens that wait are checked.

    The first checks come after 1, 2, 4, … tokens, so that text begins to flow at once.

    Args:
        most_waiting: Tokens that wait at most.
        timed: Whether time counts; processes that share a model have to check alike.
    """

    def __init__(self, most_waiting: int = MOST_WAITING, *, timed: bool = True):
        self._most, self._timed = most_waiting, timed
        self._limit = 1
        self._risk = 0.0
        self._n = 0
        self._since = 0.0

    def wait(self, risk: float) -> None:
        """One more token waits, with this risk."""
        if not self._n:
            self._since = time.perf_counter()
        self._n += 1
        self._risk += risk

    @property
    def due(self) -> bool:
        """Whether it is time to check."""
        if not self._n:
            return False
        waited = time.perf_counter() - self._since
        return (
            self._n >= min(self._limit, self._most)
            or self._risk >= MOST_RISK
            or (self._timed and self._n >= FEW and waited >= MOST_SECONDS)
        )

    def checked(self) -> None:
        """A check has been launched for all that waited."""
        self._n, self._risk, self._limit = 0, 0.0, self._limit * 2
