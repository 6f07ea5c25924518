"""How a machine decodes with a FlashHead: when proposals pay, and when they are verified."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn

from ..head.backend import PORTABLE
from ..head.flash_head import FlashHead
from ..head.steps import NO_DEPTH
from ..models.install import get_flash_head

MAX_PENDING = 32  # states of a verification: a GPU multiplies tiles of 32
MAX_RISK = 0.1
MAX_WAIT = 0.3  # seconds
FIRST_PENDING = 4
CPU_BATCH = 32  # sequences at once up to which proposals pay on a CPU
THRESHOLDS = tuple(round(0.003 * math.sqrt(2) ** i, 4) for i in range(17))  # 0.003 … 0.77
CLASSES = (1, 2, 4, 8, 16, 32)  # sizes of a product whose kernels and rounding are the same


@dataclass
class DecodingPolicy:
    """Settings of the verified loops for one head on this machine.

    Attributes:
        depth: Nats below the log-sum-exp of all scores, from which kernels leave probes out.
        max_pending: Proposals that wait for a verification, at most.
        first_pending: Those of the first one; each later one takes twice as many.
        max_risk: Sum of the risks of pending proposals at which they are verified.
        max_wait: Seconds that a token may wait.
        max_batch: Sequences at once up to which proposals are faster than the dense product; None:
            an estimate.
        gain: Tokens per second relative to dense decoding on this machine, where known.
        predicted: Whether the gain is calculated from times of the parts.
        dense: Whether proposals gain nothing on this machine.
        lockstep: Whether several processes compute the same steps: no time decides anything.
        drafts_only: Whether the head only serves a draft model.
        draft_probes: Clusters scored for a draft; None: the head's number.
    """

    depth: float = NO_DEPTH
    max_pending: int = MAX_PENDING
    first_pending: int = FIRST_PENDING
    max_risk: float = MAX_RISK
    max_wait: float = MAX_WAIT
    max_batch: int | None = None
    gain: float | None = None
    predicted: bool = False
    dense: bool = False
    lockstep: bool = False
    drafts_only: bool = False
    draft_probes: int | None = None


_policies: WeakKeyDictionary[FlashHead, DecodingPolicy] = WeakKeyDictionary()


def policy_of(head: FlashHead) -> DecodingPolicy:
    """The policy of a head, which a caller may change."""
    if head not in _policies:
        # an M1 or M2 multiplies up to five states one by one
        first = FIRST_PENDING if head.backend == PORTABLE else 2 * FIRST_PENDING
        _policies[head] = DecodingPolicy(first_pending=first)
    return _policies[head]


def batch_limit(head: FlashHead) -> int:
    """Sequences at once up to which proposals are made. C/p of them read as many rows as the dense
    head, which reads each row once."""
    known = policy_of(head).max_batch
    if known is not None:
        return known
    on_cpu = mx.default_device().type == mx.cpu
    return CPU_BATCH if on_cpu else max(1, head.n_clusters // head.n_probes)


def product_size(k: int) -> int:
    """The size to which a product of ``k`` states is filled up, so that its kernel is that whose
    rounding is known. A CPU has one for all."""
    if mx.default_device().type == mx.cpu:
        return k
    return next((size for size in CLASSES if size >= k), -(-k // CLASSES[-1]) * CLASSES[-1])


def decoding_mode(model: nn.Module, *, verify: bool = True, dense: bool = False) -> str:
    """What decodes this model's text, in words: "verified", "unverified", or "dense: " and why."""
    head = get_flash_head(model)
    if dense:
        return "dense: as requested"
    if head is None:
        return "dense: the model has no FlashHead"
    policy = policy_of(head)
    if policy.drafts_only:
        return "dense: its FlashHead only drafts"
    if not verify:
        return "unverified"
    if policy.dense:
        return "dense: FlashHead is no faster on this machine"
    return "verified"


def overhead(
    risks: Sequence[float],
    chances: Sequence[float],
    step: float,
    verification: float,
    k: int,
    max_risk: float,
) -> float:
    """Expected seconds a token that verifications and wasted steps take.

    ``risks`` and ``chances`` of another dense choice are those of proposals in their order. A
    verification of up to ``k`` tokens takes ``verification`` seconds and comes when their risks add
    up to ``max_risk``. A rejected token wastes the steps behind it, and the one that runs then.
    """
    total, n, i = 0.0, 0.0, 0
    while i < len(risks):
        end, risk = i, 0.0
        while end < len(risks) and end - i < k and (end == i or risk < max_risk):
            risk += risks[end]
            end += 1
        reached, gained = 1.0, 0.0  # the chance that all before are accepted, and accepted tokens
        total += verification
        for place in range(i, end):
            gained += reached
            total += reached * chances[place] * step * (end - place)
            reached *= 1 - chances[place]
        n += gained
        i += max(1, round(gained))
    return total / max(n, 1.0)


def best_risk(
    recorded: Sequence[int], step: float, verification: float, k: int
) -> tuple[float, float]:
    """The sum of risks at which a verification is best made, and the overhead a token with it.

    ``recorded`` are risks as `index/settings.py` keeps them: 1 + 10,000 times the risk of a
    proposal, negative where the dense choice differed. These are few: so the risks count as
    chances, scaled to add up to them and half of one more.
    """
    risks = [(abs(value) - 1) / 10_000 for value in recorded]
    n_rejected = sum(value < 0 for value in recorded)
    scale = (n_rejected + 0.5) / (sum(risks) + 0.5)
    chances = [min(scale * risk, 1.0) for risk in risks]
    tried = [(overhead(risks, chances, step, verification, k, r), r) for r in THRESHOLDS]
    seconds, risk = min(tried)
    return risk, seconds
