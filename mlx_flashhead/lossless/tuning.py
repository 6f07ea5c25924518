"""What a machine gains: the settings with the least expected time a token, by the times of a step
and of a verification, then whole rounds against dense decoding in turns (docs/speed.md)."""

import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head.backend import PORTABLE
from ..head.flash_head import FlashHead
from ..head.steps import NO_DEPTH
from ..models.compat.mlx_lm import make_prompt_cache
from ..models.install import hidden_dtype, installed_head
from .policy import MAX_PENDING, MAX_RISK, MAX_WAIT, best_risk, policy_of
from .proposer import Proposer, step_arrays
from .rounding import SlotProduct, rounding_of
from .sequence import PendingToken, normalized
from .sequence import Sequence as Text
from .verify import FEW, join

SECONDS = 5.0  # of all measurements
LEAST_GAIN = 1.03
DEPTH = 9.0  # leaves out a quarter to a half of the clusters at equal shares of differences
SHARES = (0.5, 1.0, 2.0)  # numbers of probes to try, relative to the index's
TURNS = 3
TOKENS = 5  # whose times make a median
BATCHES = (4, 8, 16, 32)  # sequences at once, for which proposals may be slower than the dense head
SCATTER = 0.15  # of the turns, relative to their median: the machine did something else, too


@dataclass(frozen=True)
class Tuning:
    n_probes: int  # clusters scored for a proposal, at most
    depth: float  # nats below the mass of all tokens from which a cluster is left out
    max_pending: int  # tokens that wait for a verification, at most
    max_risk: float  # sum of their risks at which they are verified
    gain: float  # tokens per second relative to dense decoding, the median of the turns
    dense_seconds: float  # time of a token when it is decoded densely
    spread: float  # half of the range of the turns' gains
    dense: bool  # whether dense decoding is as fast, so that the model stays dense
    provisional: bool = False  # whether the machine was busy, so that it is measured again
    max_batch: int | None = None  # sequences at once up to which proposals pay, if measured
    predicted: bool = False  # whether the gain is calculated from the times of the parts

    def apply(self, head: FlashHead) -> None:
        """Gives the settings to a head and its policy."""
        unverified = head.unverified_probes
        head.n_probes = min(self.n_probes, head.n_clusters)
        head.unverified_probes = unverified
        policy = policy_of(head)
        policy.depth, policy.max_batch = self.depth, self.max_batch
        policy.max_pending, policy.max_risk = self.max_pending, self.max_risk
        policy.gain, policy.predicted, policy.dense = self.gain, self.predicted, self.dense


def tune(
    model: nn.Module, by_probes: Sequence[dict[str, Any]] = (), *, seconds: float = SECONDS
) -> Generator[None, None, Tuning]:
    """Measures the settings on this machine, in about ``seconds``, and gives them to the head.
    Between two measurements the model is free for other work.

    ``by_probes`` are an index's: shares of differences and recorded risks by number of probes. They
    say how many steps are wasted; the machine says what steps and verifications take. Where a round
    of steps takes too long, the gain is predicted from these.
    """
    head = installed_head(model)
    began = time.perf_counter()
    parts = _Parts(model)
    times = parts.dense_times(TOKENS + 1)[1:]
    dense = median(times)
    yield
    known = {int(entry["n_probes"]): entry for entry in by_probes}
    slow = dense > seconds / 20
    settings, expected, waste = None, math.inf, 0.0
    verifications: dict[int, float] = {}
    depths = (NO_DEPTH,) if slow or head.backend == PORTABLE else (NO_DEPTH, DEPTH)
    for n_probes in [head.n_probes] if slow else _grid(head, known):
        for depth in depths:
            step = median(parts.round_times(TOKENS + 1, n_probes=n_probes, depth=depth)[1:])
            yield
            for k in _numbers_of_states(step):
                if k not in verifications:
                    verifications[k] = parts.verification(k)
                    yield
                risk, wasted = _wasted(known, n_probes, step, verifications[k], k)
                total = step + verifications[k] / k + wasted
                if total < expected:
                    settings, expected = (n_probes, depth, k, risk), total
                    waste = wasted
    assert settings is not None
    n_probes, depth, k, risk = settings
    gains: list[float] = []
    while len(gains) < TURNS and not slow:
        left = seconds - (time.perf_counter() - began)
        if gains and left < k * (dense + expected):
            break
        before = sum(parts.dense_times(k))
        after = sum(parts.round_times(k, n_probes=n_probes, depth=depth, verified=True))
        gains.append(before / (after + k * waste))
        yield
    predicted = not gains
    gain = dense / expected if predicted else median(gains)
    scattered = gains if len(gains) > 1 else [dense / each for each in times]
    spread = (max(scattered) - min(scattered)) / 2
    busy = spread > SCATTER * median(scattered) or is_busy()
    max_batch = None if slow else parts.max_batch(verifications[k] / k, began + 2 * seconds)
    tuning = Tuning(
        n_probes, depth, k, risk, gain, dense, spread, gain < LEAST_GAIN,
        provisional=busy, max_batch=max_batch, predicted=predicted,
    )  # fmt: skip
    tuning.apply(head)
    return tuning


def is_busy() -> bool:
    """Whether more processes want to run than this machine has cores."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except OSError:
        return False


def _grid(head: FlashHead, known: dict[int, Any]) -> list[int]:
    """Numbers of probes to try: the index's, and some that it knows about."""
    wanted = [max(1, min(head.n_clusters, round(head.n_probes * share))) for share in SHARES]
    near = [min(known, key=lambda n: abs(n - each)) for each in wanted if known]
    return sorted({head.n_probes, *near})


def _numbers_of_states(step: float) -> list[int]:
    """Numbers of states of a verification to try: as many as text may wait for."""
    most = min(MAX_PENDING, max(FEW, int(MAX_WAIT / step)))
    return sorted({most, *(k for k in (8, 16) if k < most)})


def _wasted(
    known: dict[int, Any], n_probes: int, step: float, verification: float, k: int
) -> tuple[float, float]:
    """The best sum of risks for a verification, and the seconds a token that it takes beyond one
    verification of k tokens at a time: steps that are thrown away, and earlier verifications."""
    below = [n for n in known if n <= n_probes]
    entry = known[max(below)] if below else {}
    if entry.get("risks"):
        risk, seconds = best_risk(entry["risks"], step, verification, k)
        return risk, max(seconds - verification / k, 0.0)
    share = float(entry.get("greedy_differs", 0.0))
    return MAX_RISK, share * step * (k / 2 + 1)


class _Parts:
    """The parts of decoding, on a short text of no meaning: nothing is rejected."""

    def __init__(self, model: nn.Module):
        self._model, self._head = model, installed_head(model)
        self._first = mx.array([13 % self._head.vocab_size], dtype=mx.uint32)

    def dense_times(self, n: int) -> list[float]:
        """Seconds of ``n`` steps as mlx-lm's loop makes them."""
        proposer = Proposer(self._model, dense=True)

        def step(latest: mx.array, cache: list[Any]) -> tuple[mx.array, list[Any]]:
            with proposer.states():
                logits = self._model(latest[None], cache=cache)[:, -1, :]
            logprobs = normalized(logits)
            token = mx.argmax(logprobs, axis=-1)
            return token, [token, logprobs]

        return self._times(n, step)

    def round_times(
        self, n: int, *, n_probes: int, depth: float, verified: bool = False
    ) -> list[float]:
        """Seconds of ``n`` steps with proposals, and with one verification of them all."""
        proposer = Proposer(self._model, n_probes=n_probes)
        policy = policy_of(self._head)
        policy.depth, before = depth, policy.depth
        text = Text(None)

        def step(latest: mx.array, cache: list[Any]) -> tuple[mx.array, list[Any]]:
            with proposer.states() as states:
                self._model(latest[None], cache=cache)
            token, chosen = proposer.propose([text], states[-1][:, -1], latest)
            return token, step_arrays(token, chosen)

        try:
            return self._times(n, step, text.pending if verified else None)
        finally:
            policy.depth = before

    def _times(
        self,
        n: int,
        step: Callable[[mx.array, list[Any]], tuple[mx.array, list[Any]]],
        pending: list[PendingToken] | None = None,
    ) -> list[float]:
        """Each step is launched before the token before it is read, as in the loops. The states of
        ``pending`` are verified once, beside a last step."""
        cache, latest, flags = make_prompt_cache(self._model), self._first, None
        times, moment = [], time.perf_counter()
        for i in range(n + 1):
            token, launched = step(latest, cache)
            mx.async_eval(launched)
            latest.item()
            if pending is not None and i:
                pending[i - 1].read(cast(int, latest.item()))
            if pending is not None and i == n - 1:
                flags = self._certain(join(self._head, pending[:i]) if i else pending[0].proposal)
                mx.async_eval(flags)
            if flags is not None and i == n:
                mx.eval(flags)
            now = time.perf_counter()
            if i:
                times.append(now - moment)
            moment, latest = now, token
        return times

    def _certain(self, proposal: Any) -> mx.array:
        rounding = rounding_of(self._head, proposal.hidden.dtype, len(proposal.hidden))
        slots = SlotProduct(self._head, proposal.hidden).result()
        room, scored = rounding.rooms(proposal)
        return self._head.steps.screen(
            slots, proposal, None, room, scored, rounding.epsilon
        ).certain

    def verification(self, k: int) -> float:
        """Seconds of a verification of ``k`` states."""
        proposal = self._head.propose(self._hidden(k), None)
        mx.eval(proposal[:-1])
        self._certain(proposal)  # its rounding is known then
        return _fastest(lambda: self._certain(proposal))

    def max_batch(self, verification: float, end: float) -> int | None:
        """The largest number of sequences whose proposals, and verifications of ``verification``
        seconds each, beat their dense product. None if the time is up at ``end``."""
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
    times = []
    for _ in range(2):
        began = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - began)
    return min(times)
