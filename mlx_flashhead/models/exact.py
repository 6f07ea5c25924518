"""Logits processors whose outcome is that of the dense model.

mlx-lm's loops hand a processor one sequence's tokens and logits and say nothing of where these come
from. Here the processors of a sequence run as one, which afterwards has the clusters scored that
matter now (`rescoring.py`). The head tells what its latest call was; in a batch, which of its rows
was handed over is seen by comparing a few columns, without evaluating them.
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

# Clusters that are scored after the processors, besides the head's own. With 512 (8,192 tokens) the
# best of 10 to 10,000 random allowed tokens was SmolLM2's own in at least 99.8 % of positions, with
# 256 in 99.5 %, with 128 in 98.5 %.
MORE_CLUSTERS = 512
# So many of the latest tokens are scored before the processors: a repetition penalty multiplies.
CONTEXT_TOKENS = 64
# Columns that tell one row of a batch from another.
COMPARED_TOKENS = 32
# A compiled softcap and the model's own differ by their rounding, which in bfloat16 is 1/256.
TOLERANCE = 1 / 64


def exact_processors(
    processors: Sequence[Processor] | None,
    model: nn.Module | None,
    draft_model: nn.Module | None = None,
) -> list[Processor]:
    """The same processors, in a list for mlx-lm, so that what they leave is exact.

    A mask or a bias may bring up tokens that the FlashHead has not scored. Afterwards these are
    scored, so that the choice is the dense model's. It holds for any processor that rules tokens
    out, adds to their logits, or changes those of the last ``CONTEXT_TOKENS`` tokens in any way. A
    processor that rescales all logits leaves a part of an estimate's error in those that the head
    had not scored.

    Nothing is evaluated, and nothing is done where there is no processor or no FlashHead.

    Args:
        processors: Functions of a sequence's tokens (n,) and logits (1, V) that return logits.
        model: The model that is decoded, or None if its head scores every token.
        draft_model: The model that drafts for it, if any: it is given the same processors.

    Raises:
        UnsupportedHeadError: If the model changes its logits in a way that rules this out.
    """
    models = [m for m in (model, draft_model) if m is not None and get_flash_head(m) is not None]
    if not processors or not models:
        return list(processors or ())
    return [_Together(processors, {installed_head(m): finish_of(m) for m in models})]


class _Together:
    """Processors of one sequence, and the second look at what they leave.

    Args:
        processors: The processors, in their order.
        finishes: What is done with the logits of each head that may be the one.
    """

    def __init__(self, processors: Sequence[Processor], finishes: dict[FlashHead, Finish]):
        self._processors = list(processors)
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
        context = _context(tokens, len(logits))
        before = logits
        if context is not None:
            found = call.head.logits_of(call.hidden, context)
            found = finish(mx.put_along_axis(call.logits, context, found, axis=-1))
            found = mx.take_along_axis(found, context, axis=-1).astype(logits.dtype)
            before = mx.put_along_axis(logits, context, found, axis=-1)
            before = mx.where(known, before, logits)
        after = self._run(tokens, mx.array(before))  # some write into what they are given
        if after.shape != before.shape:
            return after
        exact = rescored(call, before, after, MORE_CLUSTERS, finish)
        if context is not None:
            kept = mx.take_along_axis(after, context, axis=-1)
            exact = mx.put_along_axis(exact, context, kept, axis=-1)
        return mx.where(known, exact, after)

    def _run(self, tokens: Any, logits: mx.array) -> mx.array:
        for processor in self._processors:
            logits = processor(tokens, logits)
        return logits


def _rows_of(logits: mx.array, call: Call, finish: Finish) -> tuple[mx.array, mx.array]:
    """Which of the call's rows ``logits`` (R', V) are: (R',), and whether they are: (R', 1)."""
    vocab_size = logits.shape[-1]
    step = max(1, vocab_size // COMPARED_TOKENS)
    columns = mx.array([*range(0, vocab_size, step), *call.head.eos_token_ids])
    given = logits[:, columns].astype(mx.float32)
    if "finished" not in call.notes:  # once for all rows of a batch
        call.notes["finished"] = finish(call.logits)
    made = call.notes["finished"][:, columns].astype(mx.float32)
    given, made = given[:, None], made[None]  # (R', R, columns)
    apart = mx.where(given == made, 0, mx.abs(given - made) / (1 + mx.abs(made)))
    apart = mx.where(mx.isnan(apart), mx.inf, apart).max(axis=-1)
    tolerance = 0.0 if finish is unchanged else TOLERANCE
    return mx.argmin(apart, axis=-1), mx.min(apart, axis=-1, keepdims=True) <= tolerance


def _context(tokens: Any, n_rows: int) -> mx.array | None:
    """The latest tokens: (n_rows, CONTEXT_TOKENS), the first repeated where there are fewer."""
    tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens or (), dtype=mx.uint32)
    if tokens.ndim != 1 or not tokens.size:
        return None
    latest = tokens[-CONTEXT_TOKENS:]
    missing = CONTEXT_TOKENS - latest.size
    if missing:
        latest = mx.concatenate([mx.broadcast_to(latest[:1], (missing,)), latest])
    return mx.broadcast_to(latest, (n_rows, CONTEXT_TOKENS))
