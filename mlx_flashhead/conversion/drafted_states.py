"""Hidden states at a drafter's own head, recorded while it drafts answers to given requests.

Such a drafter runs on its target's states, so it cannot read text by itself.
"""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from time import monotonic

import mlx.core as mx
import numpy as np

from ..head.matrix import as_float32
from ..models.locate import HeadLocation, recorded_hidden
from .builtin_text import dialogues, given_documents
from .steps import Step, Steps

BEGINNING = 300  # characters
ANSWER_TOKENS = 64
POSITIONS = 4_000  # docs/drafts.md has what fewer of them keep


def builtin_requests() -> list[str]:
    """What users say in the given dialogues, and beginnings of the given documents, in turns."""
    said = [m["content"] for messages in dialogues() for m in messages if m["role"] == "user"]
    kinds = [[text[:BEGINNING] for text in texts] for texts in given_documents().values()]
    return [text for turn in zip_longest(said, *kinds) for text in turn if text]


def drafted_states(
    location: HeadLocation,
    answers: Iterable[Iterator[int]],
    eos_token_ids: Iterable[int],
    *,
    seconds: float,
) -> Steps[np.ndarray]:
    """Hidden states (N, D) float32 at a drafter's head, up to 4,000, or until the time limit.

    Args:
        location: The drafter's head.
        answers: Tokens of answers that are written with the drafter.
        eos_token_ids: Tokens that end an answer.
        seconds: Time limit.
    """
    states = np.empty((0, location.rows().hidden_size), np.float32)
    ends = frozenset(eos_token_ids)
    end = monotonic() + seconds
    for answer in answers:
        with recorded_hidden(location) as recorded:
            next((token for token in answer if token in ends), None)
            drafted = [hidden.reshape(-1, hidden.shape[-1]) for hidden in recorded]
            if drafted:
                states = np.concatenate([states, as_float32(mx.concatenate(drafted))])
        yield Step("Recording drafts", min(len(states), POSITIONS), POSITIONS, "position")
        if len(states) >= POSITIONS or monotonic() > end:
            break
    return states[:POSITIONS]
