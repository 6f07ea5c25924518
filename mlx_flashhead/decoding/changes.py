"""What a text's processors change in the logits, where that is known.

They apply biases and penalties to a few tokens, and rule tokens out by a grammar.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.masks import Mask
from ..head.adjustment import ChangedTokens
from ..head.rounded_product import Stretch
from ..models.compat.penalties import BIAS, FREQUENCY, PRESENCE, REPETITION, Penalty, penalty_of

# mlx-lm's makers apply their processors in this order, each at most once.
ORDER = [BIAS, REPETITION, PRESENCE, FREQUENCY]
# Tokens that may change: their clusters are scored, too.
MOST_CHANGED = 512
# Tokens of a mask whose clusters are scored, whatever their centroids say.
FEW_ALLOWED = 8


@dataclass(frozen=True)
class Changes:
    """What the processors of a text change.

    Attributes:
        penalties: By kind.
        mask: A processor that rules tokens out, after these; None without one.
    """

    penalties: dict[str, Penalty] = field(default_factory=dict)
    mask: Mask | None = None

    @classmethod
    def of(cls, processors: Sequence[Any]) -> "Changes | None":
        """What the processors change; None if one is unknown or their order is another."""
        kinds: list[str] = []
        penalties: dict[str, Penalty] = {}
        mask = None
        for processor in processors:
            if mask is not None:
                return None
            penalty = penalty_of(processor)
            if penalty is None:
                own_call = type(processor).__call__ is not Mask.__call__
                if own_call or not isinstance(processor, Mask):
                    return None
                mask = processor
            else:
                kinds.append(penalty.effect)
                penalties[penalty.effect] = penalty
        if kinds != [kind for kind in ORDER if kind in kinds]:
            return None
        known = cls(penalties, mask)
        few = len(known.biases) + known.window <= MOST_CHANGED
        # larger logits of a token stay larger, and finite ones are not plus infinity
        finite = all(bias < math.inf for bias in known.biases.values())
        if few and finite and known._penalty(REPETITION, 1.0) > 0:
            return known
        return None

    def _penalty(self, kind: str, otherwise: float) -> float:
        if kind not in self.penalties:
            return otherwise
        return self.penalties[kind].penalty

    @property
    def biases(self) -> dict[int, float]:
        """The bias of each token that has one; empty if there are none."""
        if BIAS not in self.penalties:
            return {}
        return self.penalties[BIAS].biases

    @property
    def window(self) -> int:
        """How many tokens before a place the penalties look at."""
        return max((penalty.window for penalty in self.penalties.values()), default=0)

    @cached_property
    def _ends(self) -> tuple[int, int]:
        return min(self.biases, default=0), max(self.biases, default=0)

    def fit(self, vocab_size: int) -> bool:
        """Whether all biases are for tokens of the vocabulary."""
        lowest, highest = self._ends
        return lowest >= 0 and highest < vocab_size

    def changed_tokens(self, tokens: Sequence[int], n_unread: int) -> ChangedTokens | None:
        """What changes after a text; None if nothing does.

        Args:
            tokens: The last known tokens of the text, a window of them or more.
            n_unread: Tokens after these, 0 or 1, which are not read yet.
        """
        if not self.penalties:
            return None

        def window(kind: str) -> Sequence[int]:
            if kind not in self.penalties or self.penalties[kind].window <= n_unread:
                return []
            return tokens[n_unread - self.penalties[kind].window :]

        return ChangedTokens(
            repetition=self._penalty(REPETITION, 1.0),
            presence=self._penalty(PRESENCE, 0.0),
            frequency=self._penalty(FREQUENCY, 0.0),
            biases=self.biases,
            repeated=window(REPETITION),
            present=window(PRESENCE),
            occurrences=Counter(window(FREQUENCY)),
        )

    @cached_property
    def stretch(self) -> Stretch:
        """What the penalties may make of the distance of two logits."""
        if not self.penalties:
            return Stretch()
        repetition = self._penalty(REPETITION, 1.0)
        n_roundings = len(ORDER)
        if FREQUENCY in self.penalties:
            n_roundings += self.penalties[FREQUENCY].window
        return Stretch(max(repetition, 1 / repetition), n_roundings)


def with_few_allowed(
    change: ChangedTokens | None, allowed: np.ndarray | None, vocab_size: int
) -> ChangedTokens | None:
    """Adds the tokens that a mask allows, if they are few, as tokens that change by nothing.

    At such a place a grammar decides more than the model, and the centroids may rule all of them
    out.

    Args:
        change: What changes otherwise.
        allowed: (⌈V/32⌉,) uint32, a bit for each token, the lowest first; None where all may come.
        vocab_size: V.
    """
    if allowed is None:
        return change
    words = np.flatnonzero(allowed)
    if not 0 < len(words) <= FEW_ALLOWED:
        return change
    bits = np.unpackbits(allowed[words, None].view(np.uint8), axis=-1, bitorder="little")
    rows, columns = np.nonzero(bits)
    tokens = [token for token in (words[rows] * 32 + columns).tolist() if token < vocab_size]
    if len(tokens) > FEW_ALLOWED:
        return change
    change = change or ChangedTokens()
    return replace(change, biases=dict.fromkeys(tokens, 0.0) | dict(change.biases))


def mask_array(masks: Sequence[np.ndarray | None]) -> mx.array | None:
    """Joins the masks of some rows in one array.

    Args:
        masks: The words (⌈V/32⌉,) uint32 of each row; None for a row without a mask.

    Returns:
        One array with all bits set where a row has None; None where no row has a mask.
    """
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    rows = np.full((len(masks), len(known)), 0xFFFFFFFF, known.dtype)
    for row, mask in enumerate(masks):
        if mask is not None:
            rows[row] = mask
    return mx.array(rows)
