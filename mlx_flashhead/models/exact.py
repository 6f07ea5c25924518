"""Logits processors with the same outcome as on the dense model.

mlx-lm's loops give a processor the tokens and logits of one sequence, without their origin. Here
the processors of a sequence run as one. After them, the clusters that matter now are scored
(`rescoring.py`). The head keeps its latest call. In a batch, a few columns of the logits show which
row of that call they are, without an evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head.flash_head import FlashHead
from ..head.rescoring import Call, LatestCall, rescored
from .finish import Finish, finish_of, unchanged
from .install import get_flash_head, installed_head

Processor = Callable[[Any, mx.array], mx.array]

# Clusters that are scored after the processors, besides the head's own (docs/how-it-works.md).
MORE_CLUSTERS = 512
# Number of latest tokens that are scored before the processors, since a repetition penalty
# multiplies their logits.
CONTEXT_TOKENS = 64
# Columns that distinguish the rows of a batch.
COMPARED_TOKENS = 32
# A compiled softcap and the model's own differ by their rounding, which in bfloat16 is 1/256.
TOLERANCE = 1 / 64


def exact_processors(
    processors: Sequence[Processor] | None,
    model: nn.Module | None,
    draft_model: nn.Module | None = None,
) -> list[Processor]:
    """The same processors with an exact outcome, in a list for mlx-lm.

    A mask or a bias may bring up tokens that the FlashHead has not scored. They are scored after
    it, so that the choice is the dense model's. This holds for processors that rule tokens out, add
    to their logits, or change those of the last ``CONTEXT_TOKENS`` tokens in any way. A processor
    that rescales all logits leaves part of an estimate's error in tokens that were not scored.

    Nothing is evaluated. Without processors or without a FlashHead nothing is done.

    Args:
        processors: Functions of a sequence's tokens (n,) and logits (1, V) that return logits.
        model: The decoded model, or None if its head scores every token.
        draft_model: The model that drafts for it, or None. It gets the same processors.

    Raises:
        UnsupportedHeadError: If the model changes its logits in a way that makes this impossible.
    """
    parts = [_parts(processor) for processor in processors or ()]  # some may be exact already
    own = [processor for part in parts for processor in part]
    models = [m for m in (model, draft_model) if m is not None and get_flash_head(m) is not None]
    if not own or not models:
        return own
    return [_Together(own, {installed_head(m): finish_of(m) for m in models})]


def begin(processors: Sequence[Processor]) -> None:
    """Tells processors with a method for it that a text begins."""
    for processor in (p for part in map(_parts, processors) for p in part):
        if hasattr(processor, "begin"):
            processor.begin()


def for_sequence(processors: Sequence[Processor]) -> list[Processor]:
    """Processors for another sequence. Those with a state are made new."""
    own = [p for part in map(_parts, processors) for p in part]
    return [p.for_sequence() if hasattr(p, "for_sequence") else p for p in own]


def _parts(processor: Processor) -> list[Processor]:
    return processor.processors if isinstance(processor, _Together) else [processor]


class _Together:
    """Processors of one sequence, and the second look at their outcome.

    Args:
        processors: The processors, in their order.
        finishes: The model's own change of the logits, for each head that may have made them.
    """

    def __init__(self, processors: Sequence[Processor], finishes: dict[FlashHead, Finish]):
        self.processors = list(processors)
        self._finishes = finishes
        self._latest = LatestCall()
        for head in finishes:
            head.watch(self._latest)

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        call = self._latest.call
        if call is None or logits.ndim != 2 or logits.shape[-1] != call.logits.shape[-1]:
            return self._run(tokens, logits)
        finish = self._finishes[call.head]
        rows, known = _rows_of(logits, call, finish)
        if len(call.hidden) > 1 or len(logits) > 1:
            call = call.take(rows)
        context = _context(tokens, *logits.shape)
        before = logits
        if context is not None:
            found = call.head.logits_of(call.hidden, context)
            found = finish(mx.put_along_axis(call.logits, context, found, axis=-1))
            found = mx.take_along_axis(found, context, axis=-1).astype(logits.dtype)
            before = mx.put_along_axis(logits, context, found, axis=-1)
            before = mx.where(known, before, logits)
        after = self._run(tokens, mx.array(before))  # some write into their argument
        if after.shape != before.shape:
            return after
        exact = rescored(call, before, after, MORE_CLUSTERS, finish)
        if context is not None:
            kept = mx.take_along_axis(after, context, axis=-1)
            exact = mx.put_along_axis(exact, context, kept, axis=-1)
        return mx.where(known, exact, after)

    def _run(self, tokens: Any, logits: mx.array) -> mx.array:
        for processor in self.processors:
            logits = processor(tokens, logits)
        return logits


def _rows_of(logits: mx.array, call: Call, finish: Finish) -> tuple[mx.array, mx.array]:
    """The call's rows (R',) that ``logits`` (R', V) are, and whether they are any, (R', 1)."""
    vocab_size = logits.shape[-1]
    step = max(1, vocab_size // COMPARED_TOKENS)
    ends = [token for token in call.head.eos_token_ids if 0 <= token < vocab_size]
    columns = mx.array([*range(0, vocab_size, step), *ends])
    given = logits[:, columns].astype(mx.float32)
    if "finished" not in call.notes:  # once for all rows of a batch
        call.notes["finished"] = finish(call.logits)
    made = call.notes["finished"][:, columns].astype(mx.float32)
    given, made = given[:, None], made[None]  # (R', R, columns)
    apart = mx.where(given == made, 0, mx.abs(given - made) / (1 + mx.abs(made)))
    apart = mx.where(mx.isnan(apart), mx.inf, apart).max(axis=-1)
    tolerance = 0.0 if finish is unchanged else TOLERANCE
    return mx.argmin(apart, axis=-1), mx.min(apart, axis=-1, keepdims=True) <= tolerance


def _context(tokens: Any, n_rows: int, vocab_size: int) -> mx.array | None:
    """The latest tokens (n_rows, CONTEXT_TOKENS). If there are fewer, the first is repeated."""
    tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens or (), dtype=mx.uint32)
    if tokens.ndim != 1 or not tokens.size:
        return None
    latest = tokens[-CONTEXT_TOKENS:]
    missing = CONTEXT_TOKENS - latest.size
    if missing:
        latest = mx.concatenate([mx.broadcast_to(latest[:1], (missing,)), latest])
    latest = mx.minimum(latest, vocab_size - 1)  # an image's placeholder may be larger
    return mx.broadcast_to(latest, (n_rows, CONTEXT_TOKENS))
