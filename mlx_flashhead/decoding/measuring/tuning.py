"""What a machine gains: by a model's FlashHead, and by steps of several guessed tokens."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import product
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
from ..decoder import Decoder
from ..policy import MAX_PENDING, MAX_WAIT, Tuning, policy_of
from ..proposer import Proposer
from ..sampler import Sampler
from ..schedule import FEW
from ..settings import DecodingSettings
from ..text import Text

# No turn begins after so many seconds but the first two.
SECONDS = 5.0
TURNS = 3
# Of the tokens of a verification, those behind a rejected one: simulated with the risks of 512
# positions each of SmolLM2-135M and Gemma-3-270M, where the risk lets fewer than half be computed.
WASTED = 0.25
# The scatter of the dense times, relative to their median, above which the machine was busy.
SCATTER = 0.15
# Rounds of as many tokens, among which one without a rejected token is looked for.
MOST_ROUNDS = 6
# What most programs send.
SAMPLED = Sampler(Noise(temperature=0.7, top_p=0.95), seed=0)


def tune(model: nn.Module, rejected: Sequence[float] = (0.0, 0.0)) -> Generator[None, None, Tuning]:
    """Measures what a model gains, and has its loops go by that.

    Between two measurements the model is free for other work.

    Args:
        model: A model with a FlashHead.
        rejected: The shares of proposals that are rejected in ordinary text, greedy and sampled.

    Returns:
        What it gains.
    """
    busy = is_busy()
    began = time.perf_counter()
    n = max(FEW, min(MAX_PENDING, int(MAX_WAIT / token_seconds(model, 0, FEW, dense=True))))
    yield
    gains: dict[bool, list[float]] = {False: [], True: []}
    times = []
    for turn, sampled in product(range(TURNS), (False, True)):
        if turn > 1 and time.perf_counter() - began > SECONDS:
            break
        dense = token_seconds(model, turn, n, sampled=sampled, dense=True)
        yield
        wasted = rejected[sampled] * (1 + n * WASTED)
        gains[sampled].append(dense / token_seconds(model, turn, n, sampled=sampled) / (1 + wasted))
        yield
        times.append(dense)
    usual = median(times)
    busy = busy or is_busy() or max(times) - min(times) > 2 * SCATTER * usual
    most_likely: Callable[[list[float]], float] = median
    # Other processes may have slowed the dense steps alone.
    if busy:
        most_likely = min
    tuning = Tuning(
        gain=most_likely(gains[False]),
        sampled_gain=most_likely(gains[True]),
        dense_seconds=usual,
        busy=busy,
    )
    policy_of(installed_head(model)).take(tuning)
    return tuning


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
    began = time.perf_counter()
    try:
        decoder.start([text], caches.layers, logits[:, -1])
        for _ in range(MOST_ROUNDS * n):
            before = proposer.n_rejected
            decoder.round()
            while text.ready:
                text.hand_out()
                moments.append(time.perf_counter())
                n_rejected.append(before)
            if len(moments) > n + 1 and proposer.n_rejected == n_rejected[-1 - n]:
                return (moments[-1] - moments[-1 - n]) / n
    finally:
        head.eos_token_ids = ends
    return (time.perf_counter() - began) / len(moments)
