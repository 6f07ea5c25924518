"""What a machine gains, and the settings with the least expected time a token.

These follow from the times of a step and of a verification. Then whole rounds are measured against
dense decoding in turns (docs/speed.md).
"""

import math
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..head.backend import PORTABLE
from ..head.flash_head import FlashHead
from ..head.steps import NO_DEPTH
from ..models.install import installed_head
from .part_times import PartTimes
from .policy import MAX_PENDING, MAX_RISK, MAX_WAIT, policy_of
from .schedule import FEW
from .waste import wasted

SECONDS = 5.0  # of all measurements
DEPTH = 9.0  # leaves out a quarter to a half of the clusters at equal shares of differences
SHARES = (0.5, 1.0, 2.0)  # numbers of probes to try, relative to the index's
TURNS = 3
SAMPLED_TURNS = 2
LEAST_SAMPLED_GAIN = 1.0  # below it sampled text stays dense, of a model whose greedy text gains
TOKENS = 5  # whose times make a median
SCATTER = 0.15  # of the turns, relative to their median, above which the machine was busy
# The fields of a tuning that a policy takes over.
APPLIED = (
    "dense_seconds", "sampled_dense", "depth", "max_pending", "max_risk", "gain", "dense",
    "max_batch", "predicted", "provisional",
)  # fmt: skip


def least_gain() -> float:
    """The gain of greedy text below which a model stays dense."""
    return 1.1 if mx.default_device().type == mx.cpu else 1.03


@dataclass(frozen=True)
class Tuning:
    """The settings that suit a machine, and what they gain."""

    n_probes: int  # clusters scored for a proposal, at most
    depth: float  # nats below the mass of all tokens from which a cluster is left out
    max_pending: int  # tokens that wait for a verification, at most
    max_risk: float  # sum of their risks at which they are verified
    gain: float | None  # tokens per second relative to dense decoding, the median of the turns
    dense_seconds: float  # time of a token when it is decoded densely
    spread: float  # half of the range of the turns' gains
    dense: bool  # whether dense decoding is as fast, so that the model stays dense
    provisional: bool = False  # whether the machine was busy, so that it is measured again
    max_batch: int | None = None  # sequences at once up to which proposals pay, if measured
    predicted: bool = False  # whether the gain is calculated from the times of the parts
    sampled_gain: float | None = None  # as the gain, of text at temperature .7 with top-p .95
    sampled_dense: bool = False  # whether one sampled text alone stays dense

    def apply(self, head: FlashHead) -> None:
        """Gives the settings to a head and its policy."""
        unverified = head.unverified_probes
        policy = policy_of(head)
        head.n_probes = min(self.n_probes, head.n_clusters)
        head.unverified_probes = unverified
        for name in APPLIED:
            setattr(policy, name, getattr(self, name))
        policy.adapts = True
        policy.paces.clear()


class _Settings(NamedTuple):
    """Settings of decoding, and the seconds that they are expected to take."""

    n_probes: int
    depth: float
    max_pending: int
    max_risk: float
    token: float  # of a token, with all that it needs
    waste: float  # of these, of steps and verifications of no use
    verification: float  # of ``max_pending`` tokens


def tune(
    model: nn.Module, by_probes: Sequence[dict[str, Any]] = (), *, seconds: float = SECONDS
) -> Generator[None, None, Tuning]:
    """Measures the settings on this machine, and gives them to the head.

    Between two measurements the model is free for other work. Where a round of steps takes too
    long, the gain is predicted from the times of steps and verifications and the recorded risks.

    Args:
        model: A model with a FlashHead.
        by_probes: What an index has: shares of differences and recorded risks by number of probes.
            They say how many steps are wasted; the machine says what steps and verifications take.
        seconds: About the time that it takes.

    Returns:
        The settings, and what they gain.
    """
    head = installed_head(model)
    parts = PartTimes(model)
    began = time.perf_counter()
    times = parts.steps(TOKENS + 1)[1:]
    dense = median(times)
    yield
    known = {int(entry["n_probes"]): entry for entry in by_probes}
    slow = dense > seconds / 20
    settings = yield from _fastest_settings(head, parts, known, slow=slow)
    gains: list[float] = []
    sampled: list[float] = []
    if not slow:
        round_seconds = settings.max_pending * (dense + settings.token)
        last = began + seconds - round_seconds  # when a round may begin
        gains = yield from _measured_gains(parts, settings, last)
        sampled = yield from _measured_sampled_gains(parts, settings)
    gain = median(gains) if gains else dense / settings.token
    sampled_gain = median(sampled) if sampled else None
    scattered = gains if len(gains) > 1 else [dense / step for step in times]
    spread = (max(scattered) - min(scattered)) / 2
    verification = settings.verification / settings.max_pending
    tuning = Tuning(
        n_probes=settings.n_probes,
        depth=settings.depth,
        max_pending=settings.max_pending,
        max_risk=settings.max_risk,
        gain=gain,
        dense_seconds=dense,
        spread=spread,
        dense=gain < least_gain(),
        provisional=spread > SCATTER * median(scattered) or is_busy(),
        max_batch=None if slow else parts.max_batch(verification, began + 2 * seconds),
        predicted=not gains,
        sampled_gain=sampled_gain,
        sampled_dense=(gain if sampled_gain is None else sampled_gain) < LEAST_SAMPLED_GAIN,
    )
    tuning.apply(head)
    return tuning


def _fastest_settings(
    head: FlashHead, parts: PartTimes, known: dict[int, Any], *, slow: bool
) -> Generator[None, None, _Settings]:
    """The settings with the least expected time, by the times of the parts.

    Args:
        head: The head.
        parts: The times.
        known: What is recorded, by number of probes.
        slow: Whether there is time for few measurements.
    """
    wanted = [max(1, min(head.n_clusters, round(head.n_probes * share))) for share in SHARES]
    near = [min(known, key=lambda n: abs(n - count)) for count in wanted if known and not slow]
    depths = (NO_DEPTH,) if slow or head.backend == PORTABLE else (NO_DEPTH, DEPTH)
    best = _Settings(head.n_probes, NO_DEPTH, FEW, MAX_RISK, math.inf, 0.0, 0.0)
    verifications: dict[int, float] = {}
    for n_probes, depth in product(sorted({head.n_probes, *near}), depths):
        step = median(parts.steps(TOKENS + 1, n_probes, depth)[1:])
        yield
        most = min(MAX_PENDING, max(FEW, int(MAX_WAIT / step)))  # as text may wait for
        for k in sorted({most, *(k for k in (8, 16) if k < most)}):
            if k not in verifications:
                verifications[k] = parts.verification(k)
                yield
            verification = verifications[k]
            risk, waste = wasted(known, n_probes, step, verification, k)
            token = step + verification / k + waste
            if token < best.token:
                best = _Settings(n_probes, depth, k, risk, token, waste, verification)
    return best


def _measured_gains(
    parts: PartTimes, settings: _Settings, last: float
) -> Generator[None, None, list[float]]:
    """The gains of greedy rounds in turns; after the first one none begins after ``last``."""
    gains: list[float] = []
    while len(gains) < TURNS:
        if gains and time.perf_counter() > last:
            break
        gains.append(_gain(parts, settings))
        yield
    return gains


def _measured_sampled_gains(
    parts: PartTimes, settings: _Settings
) -> Generator[None, None, list[float]]:
    """The gains of sampled rounds in turns."""
    gains: list[float] = []
    for _ in range(SAMPLED_TURNS):
        gains.append(_gain(parts, settings, sampled=True))
        yield
    return gains


def _gain(parts: PartTimes, settings: _Settings, *, sampled: bool = False) -> float:
    """The time of dense steps, relative to a round of as many."""
    k = settings.max_pending
    dense = sum(parts.steps(k, sampled=sampled))
    verified = sum(
        parts.steps(k, settings.n_probes, settings.depth, verified=True, sampled=sampled)
    )
    return dense / (verified + k * settings.waste)


def is_busy() -> bool:
    """Whether more processes want to run than this machine has cores."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except OSError:
        return False
