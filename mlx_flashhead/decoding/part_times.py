"""The times of the parts of decoding on this machine: steps, verifications and batches."""

import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head.draws.greedy import best_draws
from ..head.draws.noise import Noise
from ..head.draws.rows import Draws
from ..head.logit_map import IDENTITY
from ..head.proposal import Proposal
from ..head.steps import NO_DEPTH
from ..models.compat.mlx_lm import make_prompt_cache
from ..models.install import hidden_dtype, installed_head
from .proposer import Proposer, step_arrays
from .rounding import SlotProduct, rounding_of
from .sampler import Sampler
from .sequence import PendingToken, Sequence
from .settings import DecodingSettings
from .verification import join

# What most programs send.
SAMPLED = Sampler(Noise(temperature=0.7, top_p=0.95), seed=0)
BATCHES = (4, 8, 16, 32)  # sequences at once, for which proposals may be slower than the dense head


class PartTimes:
    """Times the parts of decoding, on a short text of no meaning: nothing is rejected."""

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

        The steps are those of the loops: proposals from ``n_probes`` clusters, with a verification
        of all of them beside the last step; or dense steps as mlx-lm's loop takes them. The tokens
        are greedy, or ``sampled``.
        """
        proposer = Proposer(
            self._model, DecodingSettings(dense=n_probes is None, n_probes=n_probes)
        )
        proposer.policy = replace(proposer.policy, depth=depth)
        if n_probes is not None:  # what MLX compiles once is no step's time
            first = Sequence(SAMPLED if sampled else None)
            token = proposer.propose([first], self._hidden(1))
            mx.eval(step_arrays(token, first.pending))
        text = Sequence(SAMPLED if sampled else None)
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
            if verified and i == n:  # computed beside the next step
                proposal, product = self._launched(text.pending[:n])
            if i > n:
                draws = Draws.of([text.draw_at(i) for i in range(n)])
                mx.eval(self._certain(proposal, product, draws))
            moments.append(time.perf_counter())
            latest = token
        return [after - before for before, after in pairwise(moments[verified:])]

    def _launched(self, tokens: list[PendingToken]) -> tuple[Proposal, SlotProduct]:
        """Pending tokens as one proposal, and the product that verifies them."""
        sources = [(cast(Proposal, each.proposal).hidden, each.row) for each in tokens]
        proposal = join(self._head, tokens)
        return proposal, SlotProduct(self._head, proposal.hidden, sources)

    def _certain(
        self, proposal: Proposal, product: SlotProduct, draws: Draws | None = None
    ) -> mx.array:
        slots = product.result()
        rounding = rounding_of(self._head, proposal.hidden.dtype, len(proposal.hidden))
        steps = self._head.steps
        tolerance = rounding.tolerance(proposal.hidden, steps)
        screen = steps.screen(
            slots,
            proposal,
            draws or best_draws(len(slots)),
            tolerance,
            rounding.epsilon,
            self._proposer.logit_map or IDENTITY,
        )
        return screen.certain

    def verification(self, k: int) -> float:
        """Seconds of a verification of ``k`` states."""
        proposal = self._head.propose(self._hidden(k), None)
        mx.eval(proposal[:-1])

        def verify() -> mx.array:
            return self._certain(proposal, SlotProduct(self._head, proposal.hidden))

        verify()  # its rounding is known then
        return _fastest(verify)

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
