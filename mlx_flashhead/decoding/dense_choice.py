"""The normal (dense) head's choices for several texts, as mlx-lm's loops make them."""

from typing import cast

import mlx.core as mx

from ..head.draws.draw import Draws
from ..head.draws.noise import Noise
from .proposer import Proposer
from .sampler import SamplerFunction, normalized
from .text import Text


def choose_densely(
    proposer: Proposer,
    texts: list[Text],
    logits: mx.array,
    others: list[Text],
    states: mx.array | None = None,
) -> mx.array:
    """Chooses the next tokens of texts by their dense logits. They are pending then.

    Args:
        proposer: Says which texts can be verified.
        texts: R of them.
        logits: The model's logits (R, V).
        others: Those beside them in the batch: mlx-lm calls a sampler that all share once.
        states: Their states (R, D), where several texts were fed at once.

    Returns:
        The tokens (R,), lazy.
    """
    n = len(texts)
    each = [logits]
    if n > 1:
        each = [logits[i : i + 1] for i in range(n)]
    head = proposer.head
    if states is not None and head is not None and head.differs_in_batches(states.dtype):
        # A text that can be verified reads as it does alone.
        for i, text in enumerate(texts):
            if proposer.can_verify(text):
                each[i] = proposer.dense_row(states[i : i + 1])
    # A text that was rolled back comes last in the batch, and draws in its turn
    order = sorted(range(n), key=lambda i: texts[i].joined)
    tokens = _choose([texts[i] for i in order], [each[i] for i in order], others)
    if order == list(range(n)):
        return tokens
    return tokens[mx.argsort(mx.array(order))]


def _choose(texts: list[Text], each: list[mx.array], others: list[Text]) -> mx.array:
    """Chooses by the logits (1, V) of each text, in the order in which they draw."""
    first = texts[0]
    if len(texts) == 1:
        return first.extend(each[0])
    shared = all(s.shares_sampler and s.sampler is first.sampler for s in [*others, *texts])
    if shared and first.draws_from_mlx and not first.ahead:
        processed = [
            text.process(row, text.context(text.n_chosen))
            for text, row in zip(texts, each, strict=True)
        ]
        logprobs = normalized(mx.concatenate(processed))
        # The sampler is called once, as mlx-lm does.
        tokens = cast(SamplerFunction, first.sampler)(logprobs)
    elif all(isinstance(s.settings, Noise) and not s.current_processors for s in texts):
        # One draw takes a fraction of the operations.
        together = mx.concatenate(each)
        logprobs = normalized(together)
        tokens = Draws.of([s.draw_at(s.n_chosen) for s in texts]).choose(together)
    else:
        chosen = [s.extend(row) for s, row in zip(texts, each, strict=True)]
        return mx.concatenate(chosen)
    for text, row in zip(texts, logprobs, strict=True):
        text.add_dense(row)
    return tokens
