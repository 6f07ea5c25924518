"""What a machine gains: by a model's FlashHead, and by steps of several guessed tokens."""

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...common.machine import is_busy
from ...head.backend import gpu_is_default
from ...head.draws.noise import Noise
from ...models.compat.mlx_lm import make_prompt_cache
from ...models.install import installed_head
from ...models.trust import is_librarys_model
from ...models.vlm import is_vlm
from ...wide.step import WideSteps
from ...wide.trial import established_costs
from ..caches import OwnCaches
from ..clock import now
from ..decoder import Decoder
from ..policy import MAX_PENDING, MAX_WAIT, Tuning, policy_of
from ..proposer import Proposer
from ..sampling import Sampler
from ..settings import DecodingSettings
from ..text import Text
from ..verification import FEW

# Turns are taken until their gains agree: as many at least, and none after so many seconds.
TURNS = 3
SECONDS = 10.0
# One says how many tokens may wait. A turn has dense and proposed ones, greedy and sampled.
LEAST_MEASUREMENTS = 1 + 4 * TURNS
# The range of the gains in the middle, relative to their median, within which they agree.
AGREEMENT = 0.1
# Of the tokens of a verification, those behind a rejected one: simulated with the risks of 512
# positions each of SmolLM2-135M and Gemma-3-270M, where the risk lets fewer than half be computed.
WASTED = 0.25
# Rounds of as many tokens, among which one without a rejected token is looked for.
MOST_ROUNDS = 6
# What most programs send.
SAMPLED = Sampler(Noise(temperature=0.7, top_p=0.95), seed=0)


def tune(model: nn.Module, rejected: Sequence[float] = (0.0, 0.0)) -> Generator[None, None, Tuning]:
    """Measures what a model gains, and has its loops go by that.

    Each turn times what is compared, one after the other. There are more turns while their gains
    disagree. Between two measurements the model is free for other work.

    Args:
        model: A model with a FlashHead.
        rejected: The shares of proposals that are rejected in ordinary text, greedy and sampled.

    Returns:
        What it gains.
    """
    disturbed = _others_slow_it()
    began = time.perf_counter()
    n = max(FEW, min(MAX_PENDING, int(MAX_WAIT / token_seconds(model, 0, FEW, dense=True))))
    yield
    gains: dict[bool, list[float]] = {False: [], True: []}
    dense_times = []
    for turn in count():
        settled = turn >= TURNS and all(map(agree, gains.values()))
        late = time.perf_counter() - began > SECONDS
        if settled or (turn >= TURNS and late):
            break
        for sampled in (False, True):
            dense = token_seconds(model, turn, n, sampled=sampled, dense=True)
            yield
            wasted = rejected[sampled] * (1 + n * WASTED)
            proposed = token_seconds(model, turn, n, sampled=sampled)
            yield
            gains[sampled].append(dense / proposed / (1 + wasted))
            dense_times.append(dense)
    tuning = Tuning(
        gain=median(gains[False]),
        sampled_gain=median(gains[True]),
        dense_seconds=median(dense_times),
        busy=not settled or disturbed or _others_slow_it(),
    )
    policy_of(installed_head(model)).take(tuning)
    return tuning


def _others_slow_it() -> bool:
    """Whether other processes take the time that is measured, as they take none of a CPU's."""
    return gpu_is_default() and is_busy()


def agree(gains: Sequence[float]) -> bool:
    """Whether the gains of several turns are near each other.

    A third of them on each side is left out, of three turns none. So the median of many turns
    is certain, even where single ones were disturbed.
    """
    ordered = sorted(gains)
    n_outside = (len(ordered) - 2) // 3
    middle = ordered[n_outside : len(ordered) - n_outside]
    return middle[-1] - middle[0] <= AGREEMENT * median(middle)


def prepare_wide_steps(model: nn.Module) -> None:
    """Tries and times the steps of several tokens that a lookup takes where it pays, once.

    Each is taken, so that nothing is compiled within a text. Evaluates.
    """
    if not gpu_is_default() or is_vlm(model) or not is_librarys_model(model):
        return
    steps = WideSteps.of(model)
    caches = make_prompt_cache(model)
    # A text may be alone in a batch.
    if all(hasattr(layer, "merge") for layer in caches):
        established_costs(steps, [layer.merge([layer]) for layer in caches])
    for width in established_costs(steps, caches):
        step = steps.feed(mx.zeros((1, width), mx.uint32), make_prompt_cache(model))
        mx.eval(step.logits)


def token_seconds(
    model: nn.Module, first: int, n: int, *, sampled: bool = False, dense: bool = False
) -> float:
    """Times decoding: seconds of a token, over ``n`` in a row of which none was rejected.

    They are seconds of work (``clock.now``).

    Args:
        model: A model with a FlashHead.
        first: The token with which the text begins.
        n: Tokens of a verification.
        sampled: Whether the text is drawn, else it is greedy.
        dense: Whether the normal (dense) head chooses the tokens.
    """
    head = installed_head(model)
    settings = DecodingSettings(dense=True)
    # No policy keeps a number of clusters that is asked for from being used.
    if not dense:
        settings = DecodingSettings(n_probes=head.n_probes)
    proposer = Proposer(model, settings)
    proposer.policy = replace(
        policy_of(head), first_pending=n, max_pending=n, max_risk=math.inf, max_wait=math.inf
    )

    def feed(tokens: mx.array, layers: list[Any]) -> mx.array:
        output: Any = model(tokens, cache=layers)
        # A vision model has them within its output.
        logits: mx.array = getattr(output, "logits", output)
        return logits

    caches = OwnCaches(make_prompt_cache(model), feed)
    decoder = Decoder(proposer, caches)
    text = Text(None)
    if sampled:
        text = Text(SAMPLED)
    logits = feed(mx.array([[first % head.vocab_size]]), caches.layers)
    # When each token came, and how many were rejected before it.
    moments: list[float] = []
    n_rejected: list[int] = []
    # No end of a text is verified at once.
    ends = head.eos_token_ids
    head.eos_token_ids = ()
    began = now()
    try:
        decoder.start([text], caches.layers, logits[:, -1])
        for _ in range(MOST_ROUNDS * n):
            before = proposer.n_rejected
            decoder.round()
            while text.ready:
                text.hand_out()
                moments.append(now())
                n_rejected.append(before)
            if len(moments) > n + 1 and proposer.n_rejected == n_rejected[-1 - n]:
                return (moments[-1] - moments[-1 - n]) / n
    finally:
        head.eos_token_ids = ends
    return (now() - began) / len(moments)
