"""How a text's tokens are sampled: by its sampler and its processors, as far as these are known.

A sampler is known if it draws as one of the kinds of ``head/draws/``. Processors are known if they
apply biases and penalties to a few tokens, and rule tokens out by a grammar.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..common.masks import Mask
from ..head.adjustment import ChangedTokens
from ..head.draws.draw import Draw, Draws
from ..head.draws.greedy import Greedy
from ..head.draws.inverse_cdf import InverseCDF
from ..head.draws.noise import Noise, position_key
from ..head.draws.summed_top_p import SummedTopP
from ..head.rounded_product import Stretch
from ..models.compat.mlx_lm import mlx_lm_sampler_settings, sample_utils, sums_from_least
from ..models.compat.penalties import BIAS, FREQUENCY, PRESENCE, REPETITION, Penalty, penalty_of
from .random_state import random_key

# More than any vocabulary has.
MOST_TOKENS = 2**31 - 1

# Tokens (n,) and logits (1, V) → logits (1, V).
Processor = Callable[[mx.array, mx.array], mx.array]
# Log-probabilities (1, V) → token (1,).
SamplerFunction = Callable[[mx.array], mx.array]

# mlx-lm's makers apply their processors in this order, each at most once.
ORDER = [BIAS, REPETITION, PRESENCE, FREQUENCY]
# Tokens that may change: their clusters are scored, too.
MOST_CHANGED = 512
# Tokens of a mask whose clusters are scored, whatever their centroids say.
FEW_ALLOWED = 8


def normalized(logits: mx.array) -> mx.array:
    """Log-probabilities as mlx-lm's loops make them: (R, V) → (R, V)."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def draw_of(sampler: object) -> Draw | None:
    """How a sampler draws: its kind and settings; None if no kind does the same."""
    if sampler is None:
        return Greedy()
    if type(sampler) is Sampler:
        return sampler.settings if sampler.plain else None
    settings = mlx_lm_sampler_settings(sampler)
    if settings is None:
        return None
    if not settings:
        return Greedy()
    if "top_p" in settings and sums_from_least(sampler):
        return SummedTopP(**settings)
    return InverseCDF(**settings)


@dataclass(eq=False)
class Sampler:
    """Draws tokens from logits; :func:`make_sampler` says what its values mean.

    Attributes:
        settings: How it draws.
        min_tokens_to_keep: Tokens that min-p keeps at least.
        xtc: The probability and the threshold of XTC, and the special tokens that it keeps.
        seed: Of every text; None for a new one each time.
        position: Of the next call, where another program's loop calls it.
    """

    settings: Draw
    min_tokens_to_keep: int = 1
    xtc: tuple[float, float, list[int]] = (0.0, 0.1, [])
    seed: int | None = None
    position: int = field(default=0, init=False)
    # The seed of these calls.
    _text_seed: int | None = field(default=None, init=False, repr=False)

    @property
    def plain(self) -> bool:
        """Whether :class:`Draws` describe its draws: without XTC and a least number of tokens."""
        keeps_more = self.settings.min_p > 0 and self.min_tokens_to_keep > 1
        return self.settings.greedy or not (self.xtc[0] or keeps_more)

    def new_seed(self) -> int:
        """The seed for a new text. Evaluates two numbers of MLX's random state if it has none."""
        if self.seed is not None:
            return self.seed
        high, low = cast(list[int], mx.random.randint(0, 2**31 - 1, shape=(2,)).tolist())
        return high << 31 | low

    def choose(self, logits: mx.array, seed: int, position: int) -> mx.array:
        """The token of a position: logits (1, V) → (1,) uint32. Lazy."""
        draw = self.settings
        key = position_key(seed, position)
        if self.plain:
            return Draws.of([(draw, key)]).choose(logits)
        # mlx-lm has 0 where these leave nothing out.
        top_p = draw.top_p
        if top_p >= 1:
            top_p = 0.0
        top_k = draw.top_k
        if top_k >= logits.shape[-1]:
            top_k = 0
        sampler = sample_utils.make_sampler(
            draw.temperature, top_p, draw.min_p, self.min_tokens_to_keep, top_k, *self.xtc
        )
        with random_key(key):
            return sampler(normalized(logits.astype(mx.float32)))

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Draws tokens for other programs' loops: (..., V) → (...).

        Each call is a position, each of the (...) a text.
        """
        if self._text_seed is None:
            self._text_seed = self.new_seed()
        of_texts = logprobs.reshape(-1, 1, logprobs.shape[-1])
        seeds = range(self._text_seed, self._text_seed + len(of_texts))
        tokens = [self.choose(of_texts[i], seed, self.position) for i, seed in enumerate(seeds)]
        self.position += 1
        return mx.concatenate(tokens).reshape(logprobs.shape[:-1])


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
    *,
    seed: int | None = None,
) -> Sampler:
    """Makes a sampler with the arguments of ``mlx_lm.sample_utils.make_sampler`` and a seed.

    Every text has this ``seed``; by default each gets a new one from MLX's random state.

    It draws from mlx-lm's distribution, with noise of its own: the same seed gives other tokens
    than mlx-lm's sampler. Top-k keeps all logits that equal the last one. Text with XTC, or with
    min-p and a least number of tokens, is decoded densely.

    Raises:
        ValueError: If a value is out of its range.
    """
    for name, value, lowest, highest in (
        ("temp", temp, 0, 1_000_000),
        ("top_p", top_p, 0, 1),
        ("min_p", min_p, 0, 1),
        ("min_tokens_to_keep", min_tokens_to_keep, 1, MOST_TOKENS),
        ("top_k", top_k, 0, MOST_TOKENS),
        ("xtc_probability", xtc_probability, 0, 1),
        ("xtc_threshold", xtc_threshold, 0, 0.5),
    ):
        if not lowest <= value <= highest:
            raise ValueError(f"{name} is {value}: it must be {lowest} to {highest:,}.")
    settings: Draw = Greedy()
    if temp:
        settings = Noise(float(temp), float(top_p) or 1.0, float(min_p), int(top_k))
    xtc = xtc_probability, xtc_threshold, list(xtc_special_tokens or ())
    return Sampler(settings, min_tokens_to_keep, xtc, seed)


@dataclass(frozen=True)
class Changes:
    """What the processors of a text change.

    Attributes:
        penalties: By their effect.
        mask: A processor that rules tokens out, after these; None without one.
    """

    penalties: dict[str, Penalty] = field(default_factory=dict)
    mask: Mask | None = None

    @classmethod
    def of(cls, processors: Sequence[Any]) -> "Changes | None":
        """What the processors change; None if one is unknown or their order is another."""
        effects: list[str] = []
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
                effects.append(penalty.effect)
                penalties[penalty.effect] = penalty
        if effects != [effect for effect in ORDER if effect in effects]:
            return None
        known = cls(penalties, mask)
        few = len(known.biases) + known.window <= MOST_CHANGED
        # Larger logits of a token stay larger, and finite ones are not plus infinity.
        finite = all(bias < math.inf for bias in known.biases.values())
        if few and finite and known._penalty(REPETITION, 1.0) > 0:
            return known
        return None

    def _penalty(self, effect: str, otherwise: float) -> float:
        if effect not in self.penalties:
            return otherwise
        return self.penalties[effect].penalty

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

        def window(effect: str) -> Sequence[int]:
            if effect not in self.penalties or self.penalties[effect].window <= n_unread:
                return []
            return tokens[n_unread - self.penalties[effect].window :]

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
    word_indices, bit_indices = np.nonzero(bits)
    allowed_ids = words[word_indices] * 32 + bit_indices
    tokens = [token for token in allowed_ids.tolist() if token < vocab_size]
    if len(tokens) > FEW_ALLOWED:
        return change
    change = change or ChangedTokens()
    return replace(change, biases=dict.fromkeys(tokens, 0.0) | dict(change.biases))


def mask_array(masks: Sequence[np.ndarray | None]) -> mx.array | None:
    """Joins the masks of the tokens of a proposal in one array.

    Args:
        masks: The words (⌈V/32⌉,) uint32 of each; None where all tokens may be chosen.

    Returns:
        (n, ⌈V/32⌉), with all bits set in the place of None; None where there is no mask at all.
    """
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    joined = np.full((len(masks), len(known)), 0xFFFFFFFF, known.dtype)
    for index, mask in enumerate(masks):
        if mask is not None:
            joined[index] = mask
    return mx.array(joined)
