"""The kinds of steps that settings can ask for, each taken once before a text needs it.

MLX compiles a kernel when it first runs, and traces a function when it is first called. What the
head's own kernels give is compared elsewhere (``head/trial.py``). Here the loop's own code runs on
random states, so that whatever it calls has been compiled, and what cannot be compiled fails before
a text.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..common.marks import masks
from ..head.backend import METAL
from ..head.draws.noise import Noise
from ..models.compat.mlx_lm import sample_utils
from ..models.install import hidden_dtype, installed_head
from .caches import Snapshot
from .policy import MAX_PENDING
from .proposer import Proposer, step_arrays
from .random_state import random_key
from .rounding import CLASSES
from .sampler import Processor, Sampler, SamplerFunction
from .schedule import VerifySchedule
from .sequence import Sequence
from .settings import DecodingSettings

TOGETHER = (2, 12)  # texts: from 12 on MLX's own product scores the centroids


@dataclass(frozen=True)
class Kind:
    """What chooses the tokens of a text."""

    name: str
    sampler: Sampler | SamplerFunction | None = None
    processors: tuple[Processor, ...] = ()


GREEDY = Kind("the likeliest tokens")


def kinds(vocab_size: int) -> list[Kind]:
    """The kinds of texts whose proposals take different steps."""
    everything = Noise(temperature=0.8, top_p=0.9, min_p=0.05, top_k=7)
    penalties = sample_utils.make_logits_processors(
        {min(5, vocab_size - 1): 1.0},
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
    )
    bits = [0xFFFFFFFE] * -(-vocab_size // 32)

    def mask(tokens: Any, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) % 32 == 0, -mx.inf, logits)

    masks(mask, lambda tokens, n_tokens: bits)
    return [
        GREEDY,
        Kind("a temperature", Sampler(Noise(temperature=1.0), seed=0)),
        Kind("top-p, min-p and top-k", Sampler(everything, seed=0)),
        Kind("mlx-lm's sampler", sample_utils.make_sampler(0.7, top_p=0.9)),
        Kind("penalties", None, tuple(penalties)),
        Kind("a grammar", None, (mask,)),
        Kind("penalties and a grammar", Sampler(everything, seed=0), (*penalties, mask)),
    ]


def rehearse(model: nn.Module) -> None:
    """Takes the steps of all kinds of texts once.

    Where MLX's own operations do all steps, as on a CPU, it takes only those of greedy text. A head
    whose kernels fail here takes MLX's operations from now on, and says so. Evaluates.

    Args:
        model: A model with a FlashHead.
    """
    head = installed_head(model)
    if head.backend != METAL:
        mx.eval(head.propose(_states(model, 1), None)[:-1])
        return
    settings = DecodingSettings(n_probes=head.n_probes)  # whatever the machine gains
    proposer = Proposer(model, settings)
    proposer.policy = replace(
        proposer.policy, first_pending=MAX_PENDING, max_risk=math.inf, max_wait=math.inf
    )
    kind = GREEDY
    try:
        with random_key((0, 0)):
            for kind in kinds(head.vocab_size):
                _rehearse_kind(proposer, kind)
    # MLX raises these for a text that does not compile, a rejected pipeline, a lost device
    except (RuntimeError, ValueError) as error:
        head.fall_back(f"the steps of text with {kind.name} do not run on this device ({error})")


def _rehearse_kind(proposer: Proposer, kind: Kind) -> None:
    for n_pending in CLASSES:
        _rehearse_text(proposer, kind, n_pending)
    for n_texts in TOGETHER:
        texts = [_text(kind) for _ in range(n_texts)]
        tokens = proposer.propose(texts, _states(proposer.model, n_texts))
        mx.eval(step_arrays(tokens, [text.pending[-1] for text in texts]))


def _rehearse_text(proposer: Proposer, kind: Kind, n_pending: int) -> None:
    """Proposes and verifies tokens of a text as the decoder does."""
    text = _text(kind)
    if not proposer.can_verify(text):
        return
    before_all = Snapshot(0, [], [], [])
    text.begin_ahead(before_all)
    text.proposing = True
    schedule = VerifySchedule(proposer, lambda texts: [before_all])
    hidden = _states(proposer.model, 1)
    latest = mx.array([0], mx.uint32)
    for _ in range(n_pending):
        text.feed(latest)
        latest = proposer.propose([text], hidden, latest)
        text.pending[-1].read(cast(int, latest.item()))
        schedule.step([text])
        mx.eval(schedule.joined)
    in_doubt = text.choose(proposer.dense_row(hidden), text.n_chosen)
    mx.eval(in_doubt)
    schedule.flush(text)
    mx.eval([pending.logprobs for pending in text.ready if pending.logprobs is not None])


def _text(kind: Kind) -> Sequence:
    prompt = mx.array([0, 1, 0, 1])
    return Sequence(kind.sampler, kind.processors, prompt, logprobs=True)


def _states(model: nn.Module, n: int) -> mx.array:
    width = installed_head(model).hidden_size
    return mx.random.normal((n, width), key=mx.random.key(n)).astype(hidden_dtype(model))
