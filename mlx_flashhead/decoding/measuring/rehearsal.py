"""The steps that settings can ask for, each taken once before a text needs it.

MLX compiles a kernel when it first runs, and traces a function when it is first called. What the
head's own kernels give is compared elsewhere (``head/kernel_trial.py``). Here the loop's own code
runs on random states, so that whatever it calls has been compiled, and what cannot be compiled
fails before a text.
"""

import math
from dataclasses import replace
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ...common.masks import Mask
from ...head.backend import METAL
from ...head.draws.noise import Noise
from ...head.rounded_product import CLASSES
from ...models.compat.mlx_lm import sample_utils
from ...models.install import hidden_dtype, installed_head
from ..caches import OwnCaches
from ..phase import Phase
from ..policy import MAX_PENDING
from ..proposer import Proposer, step_arrays
from ..random_state import random_key
from ..sampling import Processor, Sampler, SamplerFunction
from ..settings import DecodingSettings
from ..text import Text
from ..verification import VerifySchedule

# Texts at once: from 12 on MLX's own product scores the centroids.
TOGETHER = (2, 12)

# What chooses a text's tokens.
RehearsedText = tuple[Sampler | SamplerFunction | None, list[Processor]]


def rehearsed_texts(vocab_size: int) -> dict[str, RehearsedText]:
    """Texts whose proposals take different steps, by name."""
    everything = Sampler(Noise(temperature=0.8, top_p=0.9, min_p=0.05, top_k=7), seed=0)
    penalties = sample_utils.make_logits_processors(
        {min(5, vocab_size - 1): 1.0},
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
    )
    bits = [0xFFFFFFFE] * -(-vocab_size // 32)

    mask = Mask(lambda tokens, n_tokens: bits)
    return {
        "the likeliest tokens": (None, []),
        "a temperature": (Sampler(Noise(temperature=1.0), seed=0), []),
        "top-p, min-p and top-k": (everything, []),
        "mlx-lm's sampler": (sample_utils.make_sampler(0.7, top_p=0.9), []),
        "penalties": (None, penalties),
        "a grammar": (None, [mask]),
        "penalties and a grammar": (everything, [*penalties, mask]),
    }


def rehearse(model: nn.Module) -> None:
    """Takes the steps of all rehearsed texts once.

    Where the head's operations are the portable ones, as on a CPU, it takes only those of greedy
    text. A head whose kernels fail here takes the portable ones from now on, and says so.
    Evaluates.

    Args:
        model: A model with a FlashHead.
    """
    head = installed_head(model)
    hidden = mx.random.normal((max(TOGETHER), head.hidden_size), key=mx.random.key(0))
    hidden = hidden.astype(hidden_dtype(model))
    if head.backend != METAL:
        mx.eval(head.propose(hidden[:1], None)[:-1])
        return
    # Texts are verified whatever the machine gains.
    settings = DecodingSettings(n_probes=head.n_probes)
    proposer = Proposer(model, settings)
    proposer.policy = replace(
        proposer.policy, first_pending=MAX_PENDING, max_risk=math.inf, max_wait=math.inf
    )
    with random_key((0, 0)):
        for name, rehearsed in rehearsed_texts(head.vocab_size).items():
            try:
                _rehearse(proposer, rehearsed, hidden)
            # MLX raises these for code that does not compile, a rejected pipeline, a lost device.
            except (RuntimeError, ValueError) as error:
                reason = f"the steps of text with {name} do not run on this device ({error})"
                head.fall_back(reason)
                return


def _rehearse(proposer: Proposer, rehearsed: RehearsedText, hidden: mx.array) -> None:
    """Takes the steps of texts of one sort, if any of their tokens may be verified."""
    text = _text(rehearsed)
    proposer.begin(text)
    if not proposer.can_verify(text):
        return
    for n_tokens in CLASSES:
        _rehearse_text(proposer, rehearsed, hidden[:1], n_tokens)
    for n_texts in TOGETHER:
        texts = [_text(rehearsed) for _ in range(n_texts)]
        tokens = proposer.propose(texts, hidden[:n_texts])
        mx.eval(step_arrays(tokens, [text.pending[-1] for text in texts]))


def _rehearse_text(
    proposer: Proposer, rehearsed: RehearsedText, hidden: mx.array, n_tokens: int
) -> None:
    """Proposes and verifies tokens of a text as the decoder does, with a state (1, D) for each."""
    text = _text(rehearsed)
    proposer.begin(text)
    caches = OwnCaches([], proposer.model)
    text.enter(Phase.AHEAD, caches.marks([text])[0])
    schedule = VerifySchedule(proposer, caches.marks)
    latest = mx.array([0], mx.uint32)
    for _ in range(n_tokens):
        text.feed(latest)
        latest = proposer.propose([text], hidden, latest)
        text.pending[-1].read(cast(int, latest.item()))
        schedule.step([text])
        mx.eval(schedule.joined)
    in_doubt = text.choose(proposer.dense_logits(hidden), text.n_chosen)
    mx.eval(in_doubt)
    schedule.flush(text)
    mx.eval([pending.logprobs for pending in text.ready if pending.logprobs is not None])


def _text(rehearsed: RehearsedText) -> Text:
    return Text(*rehearsed, mx.array([0, 1, 0, 1]), logprobs=True)
