"""How the loops use a FlashHead: by what this machine gains, and by the text at hand.

The first is measured once (``measuring/``). The second is the pace of a kind of text: a flat
distribution, or text that is unlike what the machine was measured on, costs more doubts and
rejections than the proposals save.
"""

from dataclasses import dataclass, field
from statistics import median
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..common.stored import Positive
from ..head.backend import PORTABLE
from ..head.flash_head import FlashHead
from ..head.operations import NO_DEPTH
from ..models.install import get_flash_head
from ..models.trust import is_recognised
from .phase import (
    CHANGED_MODEL,
    NO_FASTER,
    NO_HEAD,
    REQUESTED,
    UNVERIFIED,
    VERIFIED,
    Mode,
)

# It leaves out a quarter to a half of the clusters at equal shares of differences.
DEPTH = 9.0
# States of a verification: a GPU multiplies tiles of 32.
MAX_PENDING = 32
MAX_RISK = 0.1
# In seconds.
MAX_WAIT = 0.3
FIRST_PENDING = 4

# Of the pace of a text. Proposals may lose the time of so many tokens of dense decoding, and later
# at most so much of what they have gained.
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


def least_gain() -> float:
    """The gain of greedy text below which a model stays dense."""
    return 1.1 if mx.default_device().type == mx.cpu else 1.03


@dataclass(frozen=True)
class Tuning:
    """What a FlashHead gains on a machine: tokens per second relative to dense decoding.

    Attributes:
        gain: Of greedy text.
        sampled_gain: Of text at temperature 0.7 with top-p 0.95.
        dense_seconds: Seconds of work (``clock.now``) of a token that is decoded densely.
        busy: Whether other work disturbed it: then it decides nothing, and is measured again.
    """

    gain: Positive
    sampled_gain: Positive
    dense_seconds: Positive
    busy: bool = False

    @property
    def dense(self) -> bool:
        """Whether the model stays dense: that is as fast, or nothing is known for sure."""
        return self.busy or self.gain < least_gain()


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


@dataclass
class DecodingPolicy:
    """Settings of the verified loops for one head on this machine.

    Attributes:
        depth: Nats below the mass of all scores from which kernels leave probes out.
        max_pending: Proposals that wait for a verification, at most.
        first_pending: The same for the first one; each later one takes twice as many.
        max_risk: The sum of the risks of a text's proposals at which all are verified.
        max_wait: Seconds that a token may wait.
        tuning: What the machine gains, once it is known.
        dense: Whether proposals gain nothing on this machine.
        sampled_dense: Whether one sampled text alone stays dense.
        adapts: Whether a text whose proposals do not pay goes on densely.
        paces: By whether texts are sampled, whether mlx-lm draws, and how many there are at once.
        lockstep: Whether processes compute the same steps: no time decides anything.
        draft_probes: Clusters that are scored for a draft; None: the head's number.
    """

    depth: float = NO_DEPTH
    max_pending: int = MAX_PENDING
    first_pending: int = FIRST_PENDING
    max_risk: float = MAX_RISK
    max_wait: float = MAX_WAIT
    tuning: Tuning | None = None
    dense: bool = False
    sampled_dense: bool = False
    adapts: bool = False
    paces: dict[tuple[bool, bool, int], Pace] = field(default_factory=dict)
    lockstep: bool = False
    draft_probes: int | None = None

    def take(self, tuning: Tuning, *, always: bool = False) -> None:
        """Goes by what was measured; with ``always`` text is verified whatever it gains."""
        self.tuning = tuning
        self.dense = tuning.dense and not always
        self.sampled_dense = tuning.sampled_gain < 1 and not always
        self.adapts = not always
        self.paces.clear()


_policies: WeakKeyDictionary[FlashHead, DecodingPolicy] = WeakKeyDictionary()


def policy_of(head: FlashHead) -> DecodingPolicy:
    """The policy of a head, which a caller may change."""
    if head not in _policies:
        policy = DecodingPolicy()
        if head.backend != PORTABLE:
            policy.depth = DEPTH
            # An M1 or M2 multiplies up to 5 states one by one.
            policy.first_pending = 2 * FIRST_PENDING
        _policies[head] = policy
    return _policies[head]


def decoding_mode(
    model: nn.Module, *, verify: bool = True, dense: bool = False, n_probes: int | None = None
) -> Mode:
    """What decodes this model's text.

    With ``n_probes`` that a caller has chosen it is verified whatever it gains.
    """
    head = get_flash_head(model)
    if dense:
        return REQUESTED
    if head is None:
        return NO_HEAD
    if not verify:
        return UNVERIFIED
    if not is_recognised(model):
        return CHANGED_MODEL
    if policy_of(head).dense and n_probes is None:
        return NO_FASTER
    return VERIFIED
