"""How tokens are drawn, and what is known of a caller's sampler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from ..head.draws.draw import Draw, Draws
from ..head.draws.greedy import Greedy
from ..head.draws.inverse_cdf import InverseCDF
from ..head.draws.noise import Noise, position_key
from ..head.draws.summed_top_p import SummedTopP
from ..models.compat.mlx_lm import mlx_lm_sampler_settings, sample_utils, sums_from_least
from .random_state import random_key

# More than any vocabulary has.
MOST_TOKENS = 2**31 - 1

# Tokens (n,) and logits (1, V) → logits (1, V).
Processor = Callable[[mx.array, mx.array], mx.array]
# Log-probabilities (1, V) → token (1,).
SamplerFunction = Callable[[mx.array], mx.array]


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

        Each call is a position, each row a text.
        """
        if self._text_seed is None:
            self._text_seed = self.new_seed()
        rows = logprobs.reshape(-1, 1, logprobs.shape[-1])
        seeds = range(self._text_seed, self._text_seed + len(rows))
        tokens = [self.choose(rows[i], seed, self.position) for i, seed in enumerate(seeds)]
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
