"""The package's sampler, and which samplers and processors of others can be verified."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import mlx.core as mx

from ..head.draw import (
    Draws,
    DrawSettings,
    draw,
    noise,
    noise_of_all,
    nth_best,
    position_key,
    threshold,
)
from ..models.compat.mlx_lm import is_mlx_lm_processor, mlx_lm_sampler_settings

Processor = Callable[[Any, mx.array], mx.array]  # tokens (n,), logits (1, V) → logits (1, V)
SamplerFunction = Callable[[mx.array], mx.array]  # log-probabilities (1, V) → token (1,)

GREEDY = DrawSettings()

# The "token" whose uniform number decides whether XTC is applied at a position.
XTC_TOKEN = 0xFFFFFFFE


class Trust(Enum):
    """What may be done with a sequence's sampler and processors."""

    EXACT = "exact"  # bounds hold: a choice is certain, or it is decided by its own logits
    REPLAYABLE = "replayable"  # pure: called again, on logits that are rounded otherwise
    UNKNOWN = "unknown"  # called once a token, in order: decoded by the normal (dense) head


def trust(sampler: Any, processors: Iterable[Processor] = ()) -> Trust:
    """Whether the choices of a sampler and processors can be verified.

    A caller marks a function of its arguments alone with an attribute ``pure = True``, and a
    processor that also keeps the order of a token's logits (a larger logit never becomes the
    smaller one, whatever the other tokens' are) with ``preserves_margins = True``.
    """
    changing = [processor for processor in processors if not preserves_margins(processor)]
    known = draw_settings(sampler) is not None
    if known and not changing:
        return Trust.EXACT
    pure = all(getattr(processor, "pure", False) for processor in changing)
    return (
        Trust.REPLAYABLE if pure and (known or getattr(sampler, "pure", False)) else Trust.UNKNOWN
    )


def preserves_margins(processor: Any) -> bool:
    """Whether bounds of a logit are bounds after this processor, too."""
    return getattr(processor, "preserves_margins", False) or is_mlx_lm_processor(processor)


def draw_settings(sampler: Any) -> DrawSettings | None:
    """The settings that describe a sampler's draws; None where none do."""
    if sampler is None:
        return GREEDY
    if isinstance(sampler, Sampler):
        return sampler.settings if sampler.plain else None
    settings = mlx_lm_sampler_settings(sampler)
    return None if settings is None else DrawSettings(**settings)


@dataclass(eq=False)
class Sampler:
    """Draws tokens from logits; :func:`make_sampler` says what its values mean."""

    settings: DrawSettings
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()
    seed: int | None = None
    position: int = field(default=0, init=False)  # of the next call
    _text_seed: int | None = field(default=None, init=False, repr=False)  # of these calls

    @property
    def _min_kept(self) -> int:
        return self.min_tokens_to_keep if self.settings.min_p else 1

    @property
    def plain(self) -> bool:
        """Whether :class:`Draws` describe its draws: without XTC and a least number of tokens."""
        return self.settings.greedy or (self.xtc_probability == 0 and self._min_kept == 1)

    def new_seed(self) -> int:
        """The seed for a new text. Evaluates two numbers of MLX's random state if it has none."""
        if self.seed is not None:
            return self.seed
        high, low = cast(list[int], mx.random.randint(0, 2**31 - 1, shape=(2,)).tolist())
        return high << 31 | low

    def choose(self, logits: mx.array, seed: int, position: int) -> mx.array:
        """The token of a position: logits (1, V) → (1,) uint32. Lazy."""
        logits = logits.astype(mx.float32)
        if self.settings.greedy:
            return mx.argmax(logits, axis=-1)
        key = position_key(seed, position)
        if not self.plain:
            return self._choose_with_xtc(logits, key)
        draws = Draws.of([(self.settings, key)])
        return draw(logits, noise_of_all(draws.keys, logits.shape[-1]), draws)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """For other programs' loops: (..., V) → tokens (...), a position a call and a text a
        row."""
        if self._text_seed is None:
            self._text_seed = self.new_seed()
        rows = logprobs.reshape(-1, 1, logprobs.shape[-1])
        seeds = range(self._text_seed, self._text_seed + len(rows))
        tokens = [self.choose(rows[i], seed, self.position) for i, seed in enumerate(seeds)]
        self.position += 1
        return mx.concatenate(tokens).reshape(logprobs.shape[:-1])

    def _choose_with_xtc(self, logits: mx.array, key: tuple[int, int]) -> mx.array:
        """In mlx-lm's order: top-p, min-p, XTC, top-k, and the draw at the temperature."""
        s = self.settings
        top_p = Draws.of([(DrawSettings(s.temperature, s.top_p), key)])
        kept = mx.where(logits >= threshold(logits, top_p), logits, -mx.inf)
        if s.min_p:
            lowest = threshold(
                logits, Draws.of([(DrawSettings(s.temperature, min_p=s.min_p), key)])
            )
            if self._min_kept > 1:  # of top-p's tokens: min-p brings no others back
                lowest = mx.minimum(lowest, nth_best(kept, self._min_kept))
            kept = mx.where(logits >= lowest, kept, -mx.inf)
        if self.xtc_probability > 0:
            shares = mx.softmax(kept, axis=-1)
            likely = shares > self.xtc_threshold
            last = mx.min(mx.where(likely, shares, mx.inf), axis=-1, keepdims=True)
            removed = likely & (shares > last)
            if self.xtc_special_tokens:
                removed[:, list(self.xtc_special_tokens)] = False
            chance = noise(top_p.keys, mx.array([[XTC_TOKEN]], dtype=mx.uint32))
            applied = mx.exp(-mx.exp(-chance)) <= self.xtc_probability  # the uniform number again
            kept = mx.where(applied & removed, -mx.inf, kept)
        draws = Draws.of([(DrawSettings(s.temperature, top_k=s.top_k), key)])
        return draw(kept, noise_of_all(draws.keys, logits.shape[-1]), draws)


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
    """A sampler with the arguments of ``mlx_lm.sample_utils.make_sampler``.

    It draws from mlx-lm's distribution, with noise of its own: the same seed gives other tokens
    than mlx-lm's sampler. Of equal logits at the end of a top-k all remain.

    Args:
        temp: Temperature; 0 takes the likeliest token.
        top_p: Keep the likeliest tokens that together have this probability; 0 or 1 keeps all.
        min_p: Keep tokens of at least this share of the likeliest one's probability.
        min_tokens_to_keep: Min-p keeps at least this number of tokens.
        top_k: Keep this number of likeliest tokens; 0 keeps all.
        xtc_probability: How often XTC is applied. Text with XTC is decoded densely.
        xtc_threshold: Probability above which XTC removes all tokens but the least likely one.
        xtc_special_tokens: Tokens that XTC leaves alone.
        seed: The seed of every text; default: a new one for each text, from MLX's random state.

    Raises:
        ValueError: If a value is out of its range.
    """
    for name, value, highest in (
        ("temp", temp, 1e6),
        ("top_p", top_p, 1),
        ("min_p", min_p, 1),
        ("xtc_probability", xtc_probability, 1),
        ("xtc_threshold", xtc_threshold, 0.5),
    ):
        if not 0 <= value <= highest:
            raise ValueError(f"{name} is {value}: it must be 0 to {highest:g}.")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}: it must be 0, which keeps all tokens, or more.")
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep is {min_tokens_to_keep}: it must be at least 1.")
    settings = DrawSettings(float(temp), float(top_p) or 1.0, float(min_p), int(top_k))
    xtc = xtc_probability, xtc_threshold, tuple(xtc_special_tokens or ())
    return Sampler(settings, min_tokens_to_keep, *xtc, seed=seed)
