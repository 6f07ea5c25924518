"""Whether a choice among all tokens is certain when their logits are known within bounds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..head.draw import Draws, DrawSettings, log_mass, noise_of_all, threshold
from ..head.interval import surely_kept
from ..head.margins import (
    DRAW_SPACINGS,
    MASS_ROUNDING,
    SMALLEST_FLOAT16,
    SMALLEST_FLOAT32,
    merging_distance,
    noise_margin,
)
from .random_state import Key


def are_certain(
    low: mx.array,
    high: mx.array,
    tokens: Sequence[int],
    rows: Sequence[tuple[DrawSettings, tuple[int, int]]],
    epsilon: float,
) -> mx.array:
    """Returns which tokens are the choice for any logits within bounds: greedy, or by our draws.

    Args:
        low: The lowest processed logits (k, V), of their dtype.
        high: The highest ones, likewise.
        tokens: The k tokens.
        rows: The settings of each draw, and its key.
        epsilon: The spacing of log-probabilities, relative.

    Returns:
        (k,) bool, lazy.
    """
    low = low.astype(mx.float32)
    high = high.astype(mx.float32)
    token = mx.array(list(tokens), mx.uint32)[:, None]
    is_token = mx.arange(low.shape[-1], dtype=mx.uint32) == token
    token_low = mx.take_along_axis(low, token, axis=-1)
    rival = mx.max(mx.where(is_token, -mx.inf, high), axis=-1, keepdims=True)
    greedy = token_low - rival > merging_distance(log_mass(high), rival, epsilon)
    if all(settings.greedy for settings, _ in rows):
        return greedy[:, 0]
    draws = Draws.of(rows)
    surely = surely_kept(low, high, draws, threshold(high, draws, log_mass(low) - MASS_ROUNDING))
    maybe = high >= threshold(low, draws, log_mass(high) + MASS_ROUNDING)
    scale = draws.inverse_temperature
    likely = mx.where(maybe, high * scale, -mx.inf)
    unlikely = mx.where(surely, low * scale, -mx.inf)
    noisy = mx.where(is_token, unlikely, likely) + noise_of_all(draws.keys, low.shape[-1])
    rival = mx.max(mx.where(is_token, -mx.inf, noisy), axis=-1, keepdims=True)
    token_noisy = mx.take_along_axis(noisy, token, axis=-1)
    drawn = token_noisy > rival + noise_margin(token_noisy)
    return mx.where(scale == 0, greedy, drawn)[:, 0]


def is_certain_draw(
    low: mx.array,
    high: mx.array,
    token: int,
    settings: DrawSettings,
    mlx_key: Key,
    epsilon: float,
) -> mx.array:
    """Returns whether mlx-lm's sampler draws the token for any logits within bounds.

    Args:
        low: The lowest processed logits (1, V), of their dtype.
        high: The highest ones, likewise.
        token: The token.
        settings: The settings of the draw; the temperature is above 0.
        mlx_key: The key by which it draws.
        epsilon: The spacing of log-probabilities, relative.

    Returns:
        (1,) bool, lazy.
    """
    old_cut = kept_from_least(low, high, settings.top_p) if settings.sums_from_least else None
    if old_cut is not None:
        settings = replace(settings, top_p=1.0)
    low = low.astype(mx.float32)
    high = high.astype(mx.float32)
    ids = mx.arange(low.shape[-1])
    is_token = ids == token
    draws = Draws.of([(settings, mlx_key)])
    grid = DRAW_SPACINGS * epsilon * (mx.abs(low - log_mass(high)) + 1.0) + MASS_ROUNDING
    low = low - grid
    high = high + grid
    surely = surely_kept(low, high, draws, threshold(high, draws, log_mass(low) - MASS_ROUNDING))
    maybe = high >= threshold(low, draws, log_mass(high) + MASS_ROUNDING)
    if old_cut is not None:
        surely = surely & old_cut.surely
        if settings.top_k:  # if fewer tokens surely remain, top-k may keep any other
            all_kept = Draws.of([(replace(settings, top_k=0), mlx_key)])
            before_top_k = high >= threshold(low, all_kept)
            maybe = maybe | (before_top_k & (old_cut.n_surely < settings.top_k))
        maybe = maybe & old_cut.maybe
    likely = mx.where(maybe, high * draws.inverse_temperature, -mx.inf)
    unlikely = mx.where(surely, low * draws.inverse_temperature, -mx.inf)
    # MLX draws by noise, or by the place of a uniform number in the cumulated probabilities. Either
    # way the token is certain if it is drawn in the three worst cases: all others are as likely as
    # they may be; only those with lower ids are, and the rest as unlikely as they may be; only
    # those with higher ids are.
    key = mx.array(mlx_key, mx.uint32)
    certain = surely[:, token]
    for pushed in (~is_token, ids < token, ids > token):
        case = mx.where(pushed, likely, unlikely)
        certain = certain & (mx.random.categorical(case, key=key) == token)
    return certain


class Kept(NamedTuple):
    """What a filter makes of logits that are known within bounds."""

    surely: mx.array  # (1, V) bool: kept whatever the logits are
    maybe: mx.array  # (1, V) bool: kept for some of them
    n_surely: mx.array  # (1, 1): how many of the best tokens are kept, at least


def kept_from_least(low: mx.array, high: mx.array, top_p: float) -> Kept:
    """Returns what mlx-lm 0.31's top-p keeps of logits between ``low`` and ``high``. Lazy.

    It sorts log-probabilities, adds up their probabilities from the least one on, in their dtype,
    and keeps each place at which the sum is greater than 1 - top_p. In 16 bits such a sum may lie
    far from the true one. But in sorted order each of the true values lies between those of the
    bounds, and a sum that is rounded after each addition never falls where its terms rise: the same
    operation on both bounds gives bounds of it, in whichever order MLX adds. Sums need not rise
    from one place to the next, as a GPU adds blocks, so a token is surely kept if it is kept at
    every place where it may stand. Equal values may stand in any order.

    Args:
        low: The lowest logits (1, V), of the logits' dtype.
        high: The highest ones, likewise.
        top_p: The probability of the tokens that are kept.
    """
    dtype = low.dtype
    n_tokens = low.shape[-1]
    least_total = (log_mass(low.astype(mx.float32)) - MASS_ROUNDING).astype(dtype)
    most_total = (log_mass(high.astype(mx.float32)) + MASS_ROUNDING).astype(dtype)
    low = (low - most_total).astype(mx.float32)
    high = (high - least_total).astype(mx.float32)
    sorted_low = mx.sort(low, axis=-1)
    sorted_high = mx.sort(high, axis=-1)
    # an exponential is off by less than the spacing of its dtype
    off = max(mx.finfo(dtype).eps, MASS_ROUNDING)
    smallest = SMALLEST_FLOAT16 if dtype == mx.float16 else SMALLEST_FLOAT32
    low_terms = mx.maximum(mx.exp(sorted_low) * (1 - off) - smallest, 0.0)
    high_terms = mx.exp(sorted_high) * (1 + off) + smallest
    surely_above = mx.cumsum(low_terms.astype(dtype), axis=-1) > 1 - top_p
    surely_below = mx.cumsum(high_terms.astype(dtype), axis=-1) <= 1 - top_p
    places = mx.arange(n_tokens)
    # from the one place on all are kept, and before the other none are
    n_unsure = mx.max(mx.where(surely_above, -1, places), axis=-1, keepdims=True) + 1
    n_dropped = mx.min(mx.where(surely_below, n_tokens, places), axis=-1, keepdims=True)
    last_unsure = mx.take_along_axis(sorted_high, mx.maximum(n_unsure - 1, 0), axis=-1)
    first_kept = mx.take_along_axis(sorted_low, mx.minimum(n_dropped, n_tokens - 1), axis=-1)
    surely = (n_unsure == 0) | (low > last_unsure)
    maybe = ~(high < first_kept)  # NaN may be anything
    return Kept(surely, maybe, n_tokens - n_unsure)
