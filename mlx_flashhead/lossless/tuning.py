"""What a machine gains: the loop's settings with the least expected time a token, by the times of
its parts, then tried against dense decoding in turns (docs/lossless.md)."""

import math
import time
import timeit
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.backend import PORTABLE
from ..head.flash_head import MOST_RISK, MOST_WAITING, FlashHead
from ..head.steps import NO_DEPTH
from ..models.install import hidden_dtype, installed_head
from .loop import verified_steps
from .proposals import Proposer, dense_logits
from .rounding import SlotProduct, rounding_of
from .screen import is_certain_best

SECONDS = 3.0  # of all measurements
LEAST_GAIN = 1.03
WAITING = (8, 16, MOST_WAITING)
RISKS = (0.005, 0.3)  # between which the threshold lies
DEPTH = 9.0  # leaves out a quarter to a half of the clusters at equal shares of differences
SHARES = (0.5, 1.0, 2.0)  # numbers of probes to try, relative to the index's
TURNS = 3
MOST_TOKENS = 16  # of one turn
ROWS = (4, 8, 16, 32)  # texts at once, for which proposals may be slower than the dense product
BUSY = 0.15  # spread of the turns above which the machine did something else too
PROMPT = 2  # tokens of the prompt, which takes as long as two more
TOKENS = 5  # whose times make a median


@dataclass(frozen=True)
class Tuning:
    n_probes: int  # clusters scored for a proposal, at most
    depth: float  # nats below the mass of all tokens from which a cluster is left out
    most_waiting: int  # tokens that may wait for a check
    most_risk: float  # sum of their risks at which they are checked
    gain: float  # tokens per second relative to dense decoding, the median of the turns
    dense_seconds: float  # time of a token when it is decoded densely
    spread: float  # half of the range of the turns' gains
    dense: bool  # whether dense decoding is as fast, so that the steps stay dense
    again: bool = False  # whether it should be measured once more, since the turns differ
    # Texts at once up to which proposals are faster than the dense product, if it was measured.
    checked_positions: int | None = None

    def apply(self, head: FlashHead) -> None:
        head.checked_probes = min(self.n_probes, head.n_clusters)
        head.depth = self.depth
        head.most_waiting, head.most_risk = self.most_waiting, self.most_risk
        head.checked_positions = self.checked_positions
        head.gain, head.stays_dense = self.gain, self.dense


def tune(
    model: nn.Module, differences: Sequence[dict[str, float]] = (), *, seconds: float = SECONDS
) -> Generator[None, None, Tuning]:
    """Measures the settings on this machine, in about ``seconds``, and gives them to the head.
    Between two measurements the model is free for other work.

    Where a step takes over a twentieth of that, the gain is the expected one of the index's number
    of probes. ``differences`` are the ``by_probes`` of an index.
    """
    head = installed_head(model)
    usual = head.checked_probes
    began = time.perf_counter()
    steps = _Steps(model)
    dense = steps.seconds(dense=True)
    yield
    slow = dense > seconds / 20
    shares = {int(d["n_probes"]): d["greedy_differs"] for d in differences}
    expected: dict[tuple[int, float, int, float], float] = {}
    depths = (NO_DEPTH,) if slow or head.backend == PORTABLE else (NO_DEPTH, DEPTH)
    waiting = WAITING[:2] if slow else WAITING
    checks = {k: steps.check_seconds(k) for k in waiting}  # the dense rows, for any probes
    yield
    for n_probes in [usual] if slow else _grid(head, usual, shares):
        for depth in depths:
            head.depth = depth
            step, share = steps.seconds(n_probes=n_probes), _share(shares, n_probes)
            yield
            for k in waiting:
                seconds_of_token, risk = expected_seconds(step, checks, share, k)
                expected[n_probes, depth, k, risk] = seconds_of_token
    settings = min(expected, key=expected.__getitem__)
    Tuning(*settings, 1.0, dense, 0.0, dense=False).apply(head)
    k = settings[2]
    yield
    end = max(began + seconds, time.perf_counter() + seconds / 3)  # a third at least
    positions = steps.checked_positions(checks[k] / k, end)
    gains = [dense / expected[settings]] if slow else []
    left = seconds - (time.perf_counter() - began)
    n_tokens = int(min(MOST_TOKENS, max(6, left / (2 * TURNS * dense))))
    while len(gains) < (1 if slow else TURNS):
        yield
        gains.append(steps.turn(n_tokens))
    gain, spread = median(gains), (max(gains) - min(gains)) / 2
    again = slow or spread > BUSY
    tuning = Tuning(*settings, gain, dense, spread, gain < LEAST_GAIN, again, positions)
    tuning.apply(head)
    return tuning


def expected_seconds(
    step: float, checks: Mapping[int, float], share: float, k: int
) -> tuple[float, float]:
    """The expected time of a token, and the threshold of risk with which it is least.

    A check of n states takes F + c·n seconds. A token that differs, a share q of them, throws away
    the steps after it, n/2 + 1 in the mean. So a token takes step · (1 + q · (n/2 + 1)) + F/n + c,
    least at n = sqrt(2F / (q · step)), up to k. ``checks`` are seconds by n; q is ``share``.
    """
    fewest, most = min(checks), max(checks)
    per_state = max(checks[most] - checks[fewest], 0.0) / (most - fewest)
    fixed = max(checks[k] - per_state * k, 0.0)
    if not share:
        return step + checks[k] / k, MOST_RISK
    risk = min(max(math.sqrt(2 * fixed * share / step), RISKS[0]), RISKS[1])
    n = min(k, max(risk / share, 1.0))
    return step * (1 + share * (n / 2 + 1)) + fixed / n + per_state, risk


def _grid(head: FlashHead, usual: int, shares: dict[int, float]) -> list[int]:
    """Numbers of probes to try: the index's, and some that it knows about."""
    wanted = [max(1, min(head.n_clusters, round(usual * share))) for share in SHARES]
    near = [min(shares, key=lambda known: abs(known - n)) for n in wanted if shares]
    return sorted({usual, *near})


def _share(shares: dict[int, float], n_probes: int) -> float:
    """The share of differences at a number of probes: that of the nearest known number below."""
    below = [n for n in shares if n <= n_probes]
    return shares[max(below)] if below else max(shares.values(), default=0.0)


class _Steps:
    """Steps of a model on a short text of no meaning."""

    def __init__(self, model: nn.Module):
        self._model, self._head = model, installed_head(model)
        ids = [(7919 * i + 13) % self._head.vocab_size for i in range(PROMPT)]
        self._prompt = mx.array(ids, dtype=mx.uint32)
        self._dtype = hidden_dtype(model)

    def seconds(self, *, dense: bool = False, n_probes: int | None = None) -> float:
        settings = {} if n_probes is None else {"n_probes": n_probes}
        proposer = Proposer(self._model, verify=False, dense=dense, settings=settings)
        return median(self._times(proposer, TOKENS)[1:])

    def check_seconds(self, k: int) -> float:
        """The time of a check of ``k`` states, the better of two."""
        head, hidden = self._head, self._hidden(k)
        proposal = head.propose(hidden, None)
        mx.eval(proposal)
        rounding = rounding_of(head, self._dtype)
        return _better_of_two(
            lambda: is_certain_best(head, rounding, SlotProduct(head, hidden).result(), proposal)
        )

    def checked_positions(self, check: float, end: float) -> int | None:
        """The largest number of rows whose proposals, and checks of ``check`` seconds each, beat
        their dense product. None if the time is up at ``end``."""
        head, most = self._head, 1
        for n in ROWS:
            if time.perf_counter() > end:
                return None
            hidden = self._hidden(n)
            proposing = _better_of_two(partial(head.propose, hidden, None))
            dense = _better_of_two(partial(dense_logits, head, hidden[:, None]))
            if proposing + n * check > dense:
                break
            most = n
        return most

    def _hidden(self, n: int) -> mx.array:
        hidden = mx.random.normal((n, self._head.hidden_size), key=mx.random.key(0))
        return hidden.astype(self._dtype)

    def turn(self, n_tokens: int) -> float:
        """Checked tokens per second relative to dense ones, one after the other."""
        dense = sum(self._times(Proposer(self._model, verify=False, dense=True), n_tokens)[1:])
        proposer = Proposer(self._model, verify=True)
        return dense / sum(self._times(proposer, n_tokens)[1:])

    def _times(self, proposer: Proposer, n_tokens: int) -> list[float]:
        steps = verified_steps(
            self._prompt, self._model, proposer=proposer, max_tokens=n_tokens, logprobs=False
        )
        moments = [time.perf_counter(), *(time.perf_counter() for _ in steps)]
        return [after - before for before, after in pairwise(moments)]


def _better_of_two(function: Callable[[], Any]) -> float:
    times = timeit.repeat(lambda: mx.eval(function()), timer=time.perf_counter, number=1, repeat=2)
    return min(times)
