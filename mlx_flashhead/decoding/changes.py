"""What a text's processors change of the logits, where that is known: biases and penalties of a few
tokens, and tokens that a grammar rules out."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..head.adjustment import ChangedTokens
from ..models.compat.penalties import BIAS, FREQUENCY, PRESENCE, REPETITION, Penalty, penalty_of

# mlx-lm's makers apply their processors in this order, each at most once.
ORDER = [BIAS, REPETITION, PRESENCE, FREQUENCY]
MOST_CHANGED = 512  # tokens that may change: their clusters are scored, too
EPSILON = 2.0**-23  # the spacing of float32


@dataclass(frozen=True)
class Changes:
    """What the processors of a text change.

    Attributes:
        penalties: By kind.
        mask: A processor that rules tokens out, after these; None without one.
    """

    penalties: dict[str, Penalty] = field(default_factory=dict)
    mask: Any = None

    @classmethod
    def of(
        cls, processors: Sequence[Any], is_mask: Callable[[Any], bool] = lambda _: False
    ) -> "Changes | None":
        """What the processors change; None if one of them is not known, or in another order."""
        kinds: list[str] = []
        penalties: dict[str, Penalty] = {}
        mask = None
        for processor in processors:
            penalty = penalty_of(processor)
            if mask is not None or (penalty is None and not is_mask(processor)):
                return None
            if penalty is None:
                mask = processor
            else:
                kinds.append(penalty.kind)
                penalties[penalty.kind] = penalty
        if kinds != [kind for kind in ORDER if kind in kinds]:
            return None
        known = cls(penalties, mask)
        return known if known.most_tokens <= MOST_CHANGED and known._rises else None

    @property
    def _rises(self) -> bool:
        """Whether no penalty makes a larger logit the smaller one."""
        return self._penalty(REPETITION, 1.0) > 0

    def _penalty(self, kind: str, otherwise: float) -> float:
        return self.penalties[kind].penalty if kind in self.penalties else otherwise

    @property
    def biases(self) -> dict[int, float]:
        return self.penalties[BIAS].biases if BIAS in self.penalties else {}

    @property
    def window(self) -> int:
        """Tokens before a place that the penalties look at."""
        return max((penalty.window for penalty in self.penalties.values()), default=0)

    @property
    def most_tokens(self) -> int:
        """Tokens whose logits may change at one place."""
        return len(self.biases) + self.window

    def fit(self, vocab_size: int) -> bool:
        """Whether all biases are of tokens of the vocabulary."""
        return all(0 <= token < vocab_size for token in self.biases)

    def changed_tokens(self, tokens: Sequence[int], n_unread: int) -> ChangedTokens | None:
        """What changes after a text; None if nothing does.

        Args:
            tokens: The last tokens of the text, a window of them or more, that are known.
            n_unread: Tokens after these, 0 or 1, which are not read yet.
        """
        if not self.penalties:
            return None

        def window(kind: str) -> Sequence[int]:
            n = self.penalties[kind].window - n_unread if kind in self.penalties else 0
            return tokens[-n:] if n > 0 else []

        return ChangedTokens(
            repetition=self._penalty(REPETITION, 1.0),
            presence=self._penalty(PRESENCE, 0.0),
            frequency=self._penalty(FREQUENCY, 0.0),
            biases=self.biases,
            repeated=frozenset(window(REPETITION)),
            present=frozenset(window(PRESENCE)),
            occurrences=Counter(window(FREQUENCY)),
        )

    def scored_tolerance(self, scored: mx.array, largest: mx.array, epsilon: float) -> mx.array:
        """How far a scored logit may be off after the penalties.

        Args:
            scored: (k,) float32, before them; 0 where it is exact.
            largest: (k,) float32, the largest absolute logit after them.
            epsilon: Spacing of the logits' dtype.
        """
        if not self.penalties:
            return scored
        repetition = self._penalty(REPETITION, 1.0)
        n_steps = 4 + (self.window if FREQUENCY in self.penalties else 0)
        after = scored * max(repetition, 1 / repetition) + n_steps * epsilon * largest
        return mx.where(scored > 0, after, 0.0)


def mask_words(allowed: np.ndarray, vocab_size: int) -> np.ndarray:
    """The bits of a mask, (V,) bool or shorter, the rest not allowed → (⌈V/32⌉,) uint32."""
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    packed = np.packbits(allowed[:vocab_size], bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    return words
