"""Up to how many positions at once a FlashHead is faster: the best value of ``max_positions``."""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from ..common.timing import ColdCaches, Spread, in_turns, on_batch
from ..head.flash_head import FlashHead
from .head import DENSE, LOGITS, Form, form_of, forms, in_batches

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
DENSE_PATH = "FlashHead above max_positions"


def positions_benchmark(
    head: FlashHead,
    states: mx.array,
    *,
    counts: Sequence[int] = COUNTS,
    rounds: int = 7,
    progress: bool = True,
    description: str = "Timing positions",
) -> dict:
    """Times full logits against the number of positions, in turns, with cold caches.

    Args:
        head: The head; its own ``max_positions`` stays as it is.
        states: (N, D) hidden states; each round takes others of them.
        counts: Numbers of positions (B·L) at once.
        rounds: Runs that count, of all forms in turns, for each number.
        progress: Show bars.
        description: Of the bars.

    Returns:
        Shapes, milliseconds by form and number, and the crossover, JSON-ready.
    """
    counts = sorted(set(counts))
    retrieving = head.copy()
    retrieving.max_positions = counts[-1]
    named: dict[str, Form] = {
        DENSE: forms(head)[DENSE],
        DENSE_PATH: head.dense_logits,
        LOGITS: retrieving,
    }
    cold = ColdCaches()
    ms: dict[str, list[dict]] = {name: [] for name in named}
    for count in counts:
        batches = in_batches(states, count, rounds + 1)
        seconds = in_turns(
            {name: partial(on_batch, form, batches) for name, form in named.items()},
            rounds,
            before=cold,
            progress=progress,
            description=f"{description}: {count}",
        )
        for name, taken in seconds.items():
            ms[name].append(Spread.of(taken).scaled(1000).to_dict())
    return form_of(head, states) | {
        "max_positions": head.max_positions,
        "max_positions_reason": head.max_positions_reason,
        "counts": counts,
        "ms": ms,
        "crossover": crossover(counts, ms),
    }


def crossover(counts: Sequence[int], ms: dict[str, list[dict]]) -> dict[str, int | None]:
    """The measured numbers between which the dense path becomes the faster one for good.

    Args:
        counts: Numbers of positions, rising.
        ms: Spreads of ``LOGITS`` and ``DENSE_PATH``, one for each number.

    Returns:
        ``last_faster``, the largest number at which the FlashHead's median is lower, and
        ``slower_from``, the next number. None if there is no such number.
    """
    faster = [
        i
        for i, (flash, dense) in enumerate(zip(ms[LOGITS], ms[DENSE_PATH], strict=True))
        if flash["median"] < dense["median"]
    ]
    first_slower = faster[-1] + 1 if faster else 0
    return {
        "last_faster": counts[first_slower - 1] if faster else None,
        "slower_from": counts[first_slower] if first_slower < len(counts) else None,
    }
