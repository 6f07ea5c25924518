"""What verifications and rejected tokens cost, by the risks that were recorded for an index."""

import math
from collections.abc import Sequence
from typing import Any

from .policy import MAX_RISK

THRESHOLDS = tuple(round(0.003 * math.sqrt(2) ** i, 4) for i in range(17))  # 0.003 … 0.77


def wasted(
    known: dict[int, Any], n_probes: int, step: float, verification: float, k: int
) -> tuple[float, float]:
    """Returns the best sum of risks for a verification, and the wasted seconds a token with it.

    They are what steps in vain and early verifications take beyond one verification for k tokens.
    """
    below = [n for n in known if n <= n_probes]
    entry = known[max(below)] if below else {}
    if entry.get("risks"):
        risk, seconds = best_risk(entry["risks"], step, verification, k)
        return risk, max(seconds - verification / k, 0.0)
    return MAX_RISK, float(entry.get("greedy_differs", 0.0)) * step * (k / 2 + 1)


def best_risk(
    recorded: Sequence[int], step: float, verification: float, k: int
) -> tuple[float, float]:
    """The sum of risks at which a verification is best made, and the overhead a token with it.

    ``recorded`` are risks as `index/settings.py` keeps them: 1 + 10,000 times the risk of a
    proposal, negative where the dense choice differed. These are few: so the risks count as
    chances, scaled to add up to them and half of one more.
    """
    risks = [(abs(value) - 1) / 10_000 for value in recorded]
    scale = (sum(value < 0 for value in recorded) + 0.5) / (sum(risks) + 0.5)
    chances = [min(scale * risk, 1.0) for risk in risks]
    tried = [(overhead(risks, chances, step, verification, k, r), r) for r in THRESHOLDS]
    seconds, risk = min(tried)
    return risk, seconds


def overhead(
    risks: Sequence[float],
    chances: Sequence[float],
    step: float,
    verification: float,
    k: int,
    max_risk: float,
) -> float:
    """Returns the expected seconds a token that verifications and wasted steps take.

    A rejected token wastes the steps behind it, and the one that runs then.

    Args:
        risks: Those of proposals in their order.
        chances: The chances of another dense choice, for each proposal.
        step: Seconds of a step.
        verification: Seconds of a verification.
        k: The most tokens of a verification.
        max_risk: The sum of the risks at which it comes.
    """
    total = 0.0  # seconds
    n = 0.0  # tokens
    i = 0
    while i < len(risks):
        end = i
        risk = 0.0
        while end < len(risks) and end - i < k and (end == i or risk < max_risk):
            risk += risks[end]
            end += 1
        reached = 1.0  # the chance that all before are accepted
        gained = 0.0  # accepted tokens
        total += verification
        for place in range(i, end):
            gained += reached
            total += reached * chances[place] * step * (end - place)
            reached *= 1 - chances[place]
        n += gained
        i += max(1, round(gained))
    return total / max(n, 1.0)
