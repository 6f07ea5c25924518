"""How the loops use a FlashHead on this machine."""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..common.stored import Positive
from ..head.backend import PORTABLE
from ..head.flash_head import FlashHead
from ..head.operations import NO_DEPTH
from ..models.install import get_flash_head
from ..models.trust import is_recognised
from .pace import Pace
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
