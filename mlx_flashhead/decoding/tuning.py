"""What a machine gains, and the settings with the least expected time a token.

These follow from the times of a step and of a verification. Then whole rounds are measured against
dense decoding in turns (docs/speed.md).
"""

import math
import os
import time
import timeit
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from statistics import median
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head.backend import PORTABLE
from ..head.draw import Draws, DrawSettings
from ..head.flash_head import FlashHead
from ..head.logit_map import IDENTITY
from ..head.proposal import Proposal
from ..head.steps import NO_DEPTH
from ..models.compat.mlx_lm import make_prompt_cache
from ..models.install import hidden_dtype, installed_head
from .policy import MAX_PENDING, MAX_RISK, MAX_WAIT, policy_of
from .proposer import Proposer, step_arrays
from .rounding import SlotProduct, rounding_of
from .sampler import Sampler
from .schedule import FEW
from .sequence import Sequence as Text
from .verification import join

SECONDS = 5.0  # of all measurements
DEPTH = 9.0  # leaves out a quarter to a half of the clusters at equal shares of differences
SHARES = (0.5, 1.0, 2.0)  # numbers of probes to try, relative to the index's
TURNS = 3
SAMPLED_TURNS = 2
# What most programs send.
SAMPLED = Sampler(DrawSettings(temperature=0.7, top_p=0.95), seed=0)
TOKENS = 5  # whose times make a median
BATCHES = (4, 8, 16, 32)  # sequences at once, for which proposals may be slower than the dense head
SCATTER = 0.15  # of the turns, relative to their median: the machine did something else, too
# of a tuning, that a policy takes over
APPLIED = (
    "dense_seconds", "sampled_dense", "depth", "max_pending", "max_risk", "gain", "dense",
    "max_batch", "predicted", "provisional",
)  # fmt: skip
THRESHOLDS = tuple(round(0.003 * math.sqrt(2) ** i, 4) for i in range(17))  # 0.003 … 0.77


def least_gain() -> float:
    """The gain below which text stays dense, greedy and sampled each for itself."""
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
    sampled_dense: bool = False  # whether sampled text stays dense

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


def tune(
    model: nn.Module, by_probes: Sequence[dict[str, Any]] = (), *, seconds: float = SECONDS
) -> Generator[None, None, Tuning]:
    """Measures the settings on this machine, and gives them to the head.

    Between two measurements the model is free for other work. Where a round of steps takes too
    long, the gain is predicted from the times of steps and verifications and the recorded risks.

    Args:
        model: A model with a FlashHead.
        by_probes: Those of an index: shares of differences and recorded risks by number of probes.
            They say how many steps are wasted; the machine says what steps and verifications take.
        seconds: About the time that it takes.

    Returns:
        The settings, and what they gain.
    """
    head = installed_head(model)
    parts = _Parts(model)
    began = time.perf_counter()
    times = parts.steps(TOKENS + 1)[1:]
    dense = median(times)
    yield
    # 1) The settings with the least expected time, by the times of the parts.
    known = {int(entry["n_probes"]): entry for entry in by_probes}
    slow = dense > seconds / 20
    wanted = [max(1, min(head.n_clusters, round(head.n_probes * share))) for share in SHARES]
    near = [min(known, key=lambda n: abs(n - each)) for each in wanted if known and not slow]
    depths = (NO_DEPTH,) if slow or head.backend == PORTABLE else (NO_DEPTH, DEPTH)
    settings = (head.n_probes, NO_DEPTH, FEW, MAX_RISK)
    expected = math.inf
    waste = 0.0
    verifications: dict[int, float] = {}
    for n_probes, depth in product(sorted({head.n_probes, *near}), depths):
        step = median(parts.steps(TOKENS + 1, n_probes, depth)[1:])
        yield
        most = min(MAX_PENDING, max(FEW, int(MAX_WAIT / step)))  # as text may wait for
        for k in sorted({most, *(k for k in (8, 16) if k < most)}):
            if k not in verifications:
                verifications[k] = parts.verification(k)
                yield
            risk, wasted = _wasted(known, n_probes, step, verifications[k], k)
            total = step + verifications[k] / k + wasted
            if total < expected:
                settings = (n_probes, depth, k, risk)
                expected = total
                waste = wasted
    # 2) Whole rounds with them, and as many dense steps, in turns.
    n_probes, depth, k, risk = settings
    gains: list[float] = []
    while len(gains) < TURNS and not slow:
        left = seconds - (time.perf_counter() - began)
        if gains and left < k * (dense + expected):
            break
        before = sum(parts.steps(k))
        after = sum(parts.steps(k, n_probes, depth, verified=True))
        gains.append(before / (after + k * waste))
        yield
    sampled: list[float] = []
    while len(sampled) < SAMPLED_TURNS and not slow:
        before = sum(parts.steps(k, sampled=True))
        after = sum(parts.steps(k, n_probes, depth, verified=True, sampled=True))
        sampled.append(before / (after + k * waste))
        yield
    sampled_gain = median(sampled) if sampled else None
    gain = median(gains) if gains else dense / expected
    scattered = gains if len(gains) > 1 else [dense / each for each in times]
    spread = (max(scattered) - min(scattered)) / 2
    tuning = Tuning(
        *settings,
        gain,
        dense,
        spread,
        dense=gain < least_gain(),
        provisional=spread > SCATTER * median(scattered) or is_busy(),
        max_batch=None if slow else parts.max_batch(verifications[k] / k, began + 2 * seconds),
        predicted=not gains,
        sampled_gain=sampled_gain,
        sampled_dense=(gain if sampled_gain is None else sampled_gain) < least_gain(),
    )
    tuning.apply(head)
    return tuning


def is_busy() -> bool:
    """Whether more processes want to run than this machine has cores."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except OSError:
        return False


def _wasted(
    known: dict[int, Any], n_probes: int, step: float, verification: float, k: int
) -> tuple[float, float]:
    """Returns the best sum of risks for a verification, and the seconds a token that it wastes.

    These are beyond one verification of k tokens at a time: steps that are thrown away, and earlier
    verifications.
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


class _Parts:
    """The parts of decoding, on a short text of no meaning: nothing is rejected."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._head = installed_head(model)
        self._proposer = Proposer(model)

    def steps(
        self,
        n: int,
        n_probes: int | None = None,
        depth: float = NO_DEPTH,
        verified: bool = False,
        sampled: bool = False,
    ) -> list[float]:
        """Returns the seconds of ``n`` steps, each launched before the token before it is read.

        That is as in the loops: with proposals from ``n_probes`` clusters, and with one
        verification of as many beside the last step; or dense ones as mlx-lm's loop makes them. The
        tokens are greedy, or ``sampled``.
        """
        proposer = Proposer(self._model, dense=n_probes is None, n_probes=n_probes)
        proposer.policy = replace(proposer.policy, depth=depth)
        if n_probes is not None:  # what MLX compiles once is no step's time
            first = Text(SAMPLED if sampled else None)
            token = proposer.propose([first], self._hidden(1))
            mx.eval(step_arrays(token, first.pending))
        text = Text(SAMPLED if sampled else None)
        cache = make_prompt_cache(self._model)
        latest = mx.array([13 % self._head.vocab_size], dtype=mx.uint32)
        moments: list[float] = []
        for i in range(n + 1 + verified):
            states: list[mx.array] = []
            with proposer.noting(states, logits=n_probes is None):
                output = self._model(latest[None], cache=cache)
            logits = getattr(output, "logits", output)  # as a vision model has them
            if n_probes is None:
                token, logprobs = text.choose(logits[:, -1], 0)
                mx.async_eval(token, logprobs)
            else:
                token = proposer.propose([text], states[-1][:, -1])
                mx.async_eval(step_arrays(token, text.pending[-1:]))
            read = cast(int, latest.item())
            if verified and i:
                text.pending[i - 1].read(read)
            if verified and i == n:
                draws = Draws.of([text.draw_at(i) for i in range(n)]) if sampled else None
                certain = self._certain(join(self._head, text.pending[:n]), draws)
                mx.async_eval(certain)
            if i > n:
                mx.eval(certain)
            moments.append(time.perf_counter())
            latest = token
        return [after - before for before, after in pairwise(moments[verified:])]

    def _certain(self, proposal: Proposal, draws: Draws | None = None) -> mx.array:
        rounding = rounding_of(self._head, proposal.hidden.dtype, len(proposal.hidden))
        slots = SlotProduct(self._head, proposal.hidden).result()
        steps = self._head.steps
        tolerance = rounding.tolerance(proposal.hidden, steps)
        screen = steps.screen(
            slots,
            proposal,
            draws,
            tolerance,
            rounding.epsilon,
            self._proposer.logit_map or IDENTITY,
        )
        return screen.certain

    def verification(self, k: int) -> float:
        """Seconds of a verification of ``k`` states."""
        proposal = self._head.propose(self._hidden(k), None)
        mx.eval(proposal[:-1])
        self._certain(proposal)  # its rounding is known then
        return _fastest(lambda: self._certain(proposal))

    def max_batch(self, verification: float, end: float) -> int | None:
        """Returns the largest number of sequences whose proposals beat their dense product.

        Verifications of ``verification`` seconds each count with the proposals. None if the time is
        up at ``end``.
        """
        most = 1
        for n in BATCHES:
            if time.perf_counter() > end:
                return None
            hidden = self._hidden(n)
            proposing = _fastest(partial(self._head.propose, hidden, None))
            if proposing + n * verification > _fastest(partial(self._head.dense_logits, hidden)):
                break
            most = n
        return most

    def _hidden(self, n: int) -> mx.array:
        hidden = mx.random.normal((n, self._head.hidden_size), key=mx.random.key(0))
        return hidden.astype(hidden_dtype(self._model))


def _fastest(function: Callable[[], Any]) -> float:
    """The shorter time of two calls."""

    def evaluate() -> None:
        mx.eval(function())

    return min(timeit.repeat(evaluate, timer=time.perf_counter, repeat=2, number=1))
