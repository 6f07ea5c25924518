"""The normal (dense) head's choices for several texts, as mlx-lm's loops make them."""

from typing import cast

import mlx.core as mx

from ..head.draws.draw import Draws
from ..head.draws.noise import Noise
from .proposer import Proposer
from .sampler import SamplerFunction, normalized
from .text import PendingToken, Text


def choose_densely(
    proposer: Proposer,
    sequences: list[Text],
    logits: mx.array,
    others: list[Text],
    states: mx.array | None = None,
) -> mx.array:
    """Chooses the next tokens of sequences by their dense logits. They are pending then.

    Args:
        proposer: Says which texts can be verified.
        sequences: R of them.
        logits: The model's logits (R, V).
        others: Those beside them in the batch: mlx-lm calls a sampler that all share once.
        states: Their states (R, D), where several texts were fed at once.

    Returns:
        The tokens (R,), lazy.
    """
    n = len(sequences)
    each = [logits[i : i + 1] if n > 1 else logits for i in range(n)]
    head = proposer.head
    if states is not None and head is not None and head.differs_in_batches(states.dtype):
        # the text of a sequence that can be verified is the one that it has alone
        for i, sequence in enumerate(sequences):
            if proposer.can_verify(sequence):
                each[i] = proposer.dense_row(states[i : i + 1])
    # a text that was rolled back comes last in the batch, and draws in its turn
    order = sorted(range(n), key=lambda i: sequences[i].joined)
    tokens = _choose([sequences[i] for i in order], [each[i] for i in order], others)
    return tokens if order == list(range(n)) else tokens[mx.argsort(mx.array(order))]


def _choose(sequences: list[Text], each: list[mx.array], others: list[Text]) -> mx.array:
    """Chooses by the logits (1, V) of each sequence, in the order in which they draw."""
    first = sequences[0]
    if len(sequences) == 1:
        return first.extend(each[0])
    shared = all(s.shares_sampler and s.sampler is first.sampler for s in [*others, *sequences])
    if shared and first.draws_from_mlx and not first.ahead:
        processed = [
            sequence.process(row, sequence.context(sequence.n_chosen))
            for sequence, row in zip(sequences, each, strict=True)
        ]
        logprobs = normalized(mx.concatenate(processed))
        tokens = cast(SamplerFunction, first.sampler)(logprobs)  # called once, as mlx-lm does
    elif all(isinstance(s.settings, Noise) and not s.current_processors for s in sequences):
        together = mx.concatenate(each)  # one draw, in a fraction of the operations
        logprobs = normalized(together)
        tokens = Draws.of([s.draw_at(s.n_chosen) for s in sequences]).choose(together)
    else:
        chosen = [s.extend(row) for s, row in zip(sequences, each, strict=True)]
        return mx.concatenate(chosen)
    for sequence, row in zip(sequences, logprobs, strict=True):
        sequence.pending.append(PendingToken(logprobs=row if sequence.logprobs else None))
    return tokens
