"""Which head chooses the next token on this machine: the settings for a FlashHead."""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import mlx.nn as nn

from ..head.backend import PORTABLE
from ..head.flash_head import FlashHead
from ..head.steps import NO_DEPTH
from ..models.install import get_flash_head, is_recognised
from .pace import Pace

MAX_PENDING = 32  # states of a verification: a GPU multiplies tiles of 32
MAX_RISK = 0.1
MAX_WAIT = 0.3  # seconds
FIRST_PENDING = 4


@dataclass
class DecodingPolicy:
    """Settings of the verified loops for one head on this machine."""

    depth: float = NO_DEPTH  # nats below the mass of all scores from which kernels leave probes out
    max_pending: int = MAX_PENDING  # proposals that wait for a verification, at most
    first_pending: int = FIRST_PENDING  # for the first one; each later one takes twice as many
    max_risk: float = MAX_RISK  # sum of the risks of a text's proposals at which all are verified
    max_wait: float = MAX_WAIT  # seconds that a token may wait
    max_batch: int | None = None  # sequences at once up to which proposals pay; None: an estimate
    gain: float | None = None  # tokens per second relative to dense decoding, where known
    predicted: bool = False  # whether the gain is calculated from times of the parts
    provisional: bool = False  # whether the machine was busy, so that it is measured again
    sampled_dense: bool = False  # whether one sampled text alone stays dense
    adapts: bool = False  # whether a text whose proposals do not pay goes on densely
    dense_seconds: float | None = None  # of a dense token of one text, where known
    # by whether texts are sampled, whether mlx-lm draws, and how many there are at once
    paces: dict[tuple[bool, bool, int], Pace] = field(default_factory=dict)
    dense: bool = False  # whether proposals gain nothing on this machine
    lockstep: bool = False  # whether processes compute the same steps: no time decides anything
    drafts_only: bool = False  # whether the head only serves a draft model
    draft_probes: int | None = None  # clusters scored for a draft; None: the head's number


_policies: WeakKeyDictionary[FlashHead, DecodingPolicy] = WeakKeyDictionary()


def policy_of(head: FlashHead) -> DecodingPolicy:
    """The policy of a head, which a caller may change."""
    if head not in _policies:
        # an M1 or M2 multiplies up to five states one by one
        first = FIRST_PENDING if head.backend == PORTABLE else 2 * FIRST_PENDING
        _policies[head] = DecodingPolicy(first_pending=first)
    return _policies[head]


def decoding_mode(model: nn.Module, *, verify: bool = True, dense: bool = False) -> str:
    """What decodes this model's text, in words: "verified", "unverified", or "dense: " and why."""
    head = get_flash_head(model)
    if dense:
        return "dense: as requested"
    if head is None:
        return "dense: the model has no FlashHead"
    if policy_of(head).drafts_only:
        return "dense: its FlashHead only drafts"
    if not verify:
        return "unverified"
    if not is_recognised(model):
        return "dense: the model is wrapped or changed, so nothing is known of its text"
    if policy_of(head).dense:
        return "dense: FlashHead is no faster on this machine"
    return "verified"
