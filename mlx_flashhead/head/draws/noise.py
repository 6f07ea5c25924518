"""A draw by this package's noise: temperature, top-p, min-p and top-k.

    token = argmax over the kept tokens of logit / temperature + noise(seed, position, token)

So the scored tokens, all tokens and a kernel draw the same token wherever they see the same logits.

Source: Gumbel 1954, the Gumbel-max trick; Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3", for Threefry, which is MLX's generator.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from ..clustered import ClusteredRows, in_token_order
from ..margins import MASS_MARGIN, noise_margin
from .bounds import Bounds, Interval, Near, log_mass, nearest
from .draw import Draw, Draws, Key
from .filters import surely_left_out, threshold
from .greedy import best_token

# The float32 number below 1.
BELOW_ONE = 1 - 2.0**-24

# The constants of the same names in metal/flash_head/tally.h. One in e^11 tokens has more noise.
LIKELY_NOISE = 11.0
# The exponential of more nats is infinite.
MOST_NATS = 80.0
# Clusters not scored whose noise is computed if filters leave tokens out.
NOISY_CLUSTERS = 1024


@dataclass(frozen=True)
class Noise(Draw):
    """Draws by noise, from the key of a seed and a position; see :func:`position_key`."""

    kernels: ClassVar[tuple[str, ...]] = ("sample", "screen", "certain")

    @staticmethod
    def choose(
        logits: mx.array,
        draws: Draws,
        token_ids: mx.array | None = None,
        others: mx.array | None = None,
    ) -> mx.array:
        """Draws a token at each position: as :meth:`Draw.choose`."""
        if token_ids is None:
            gumbel = noise_of_all(draws.keys, logits.shape[-1])
        else:
            gumbel = noise(draws.keys, token_ids)
        values = logits * draws.inverse_temperature + gumbel
        if draws.filters:
            total = None
            if others is not None:
                total = mx.logaddexp(log_mass(logits), others)
            cut = threshold(logits, draws, total)
            values = mx.where(logits >= cut, values, -mx.inf)
        return best_token(values, token_ids)

    @staticmethod
    def certain(bounds: Bounds, draws: Draws) -> mx.array:
        """Returns whether no other token than the proposed one can be drawn: (k, 1) bool.

        It is so if the filters keep the token, and no other token that they may keep can have a
        higher noisy logit.
        """
        scored = bounds.scored
        inverse = draws.inverse_temperature
        floor = scored.own.low
        least_scored, most_scored = scored.all.masses(bounds.scored_mass)
        least_others, most_others = bounds.unscored.masses(bounds.unscored_mass)
        least = mx.logaddexp(least_scored, least_others)
        most = mx.logaddexp(most_scored, most_others)
        kept = _is_kept(bounds, least, draws)

        # A rival is the highest logit of those whose noisy logit may reach the token's.
        near = _rivals(bounds.clustered, bounds.unscored, draws)
        own_noise, scored_noise, near_noise = _noises(bounds, near.ids, draws)
        worst = floor * inverse + own_noise
        worst = worst - noise_margin(worst)

        def highest_reaching(high: mx.array, gumbel: mx.array) -> mx.array:
            reaching = mx.where(high * inverse + gumbel >= worst, high, -mx.inf)
            return mx.max(reaching, axis=-1, keepdims=True)

        rival = mx.maximum(
            highest_reaching(scored.rest.high, scored_noise),
            highest_reaching(near.logits.high, near_noise),
        )
        if near.best_other is not None:
            rival = mx.maximum(rival, near.best_other)

        # Where the filters leave it out, they leave out all below it.
        cut = (worst - LIKELY_NOISE) / inverse
        near_low = near.logits.low
        near_shares = mx.where(near_low > cut, mx.exp(near_low - most), 0)
        near_over = near_shares.sum(axis=-1, keepdims=True)
        near_over = mx.where(rival <= cut, near_over, 0)
        left_out = surely_left_out(rival, scored.all, draws, most, near_over)
        return kept & ((rival == -mx.inf) | left_out)


def _is_kept(bounds: Bounds, log_least: mx.array, draws: Draws) -> mx.array:
    """Returns whether the filters keep the proposed token, whatever lies above it: (k, 1) bool.

    ``log_least`` (k, 1) is the log of the least mass of all tokens.
    """
    scored = bounds.scored
    unscored = bounds.unscored
    floor = scored.own.low
    high = scored.rest.high
    over = high > floor
    rivals = unscored.logits > floor[..., None] - unscored.off
    n_rivals = rivals.sum(axis=(1, 2))[:, None]
    # That is min-p's condition. Without a min-p it holds unless a logit is NaN.
    best = mx.maximum(scored.second.high, bounds.best_unscored)
    kept = floor >= best + draws.log_min_p
    if draws.any_top_p:
        shares = mx.where(over, mx.exp(high - log_least), 0)
        share = shares.sum(axis=-1, keepdims=True)
        # The others have their number times the best of them, or less.
        best_share = mx.exp(mx.minimum(bounds.best_unscored - log_least, MOST_NATS))
        share = share + n_rivals * best_share
        kept &= (draws.top_p >= 1) | (share < draws.top_p * (1 - MASS_MARGIN))
    if draws.most_top_k:
        n_over = over.sum(axis=-1, keepdims=True) + n_rivals
        kept &= (draws.top_k == 0) | (n_over < draws.top_k)
    return kept


def _rivals(clustered: ClusteredRows, unscored: Interval, draws: Draws) -> Near:
    """All tokens, or where the draws have filters those of the nearest clusters."""
    if clustered.n_clusters <= NOISY_CLUSTERS or not draws.filters:
        logits = unscored.map(lambda array: in_token_order(array.flatten(1), clustered.slot_of))
        return Near(logits, None, None)
    return nearest(clustered, unscored, NOISY_CLUSTERS)


def _noises(
    bounds: Bounds, near_ids: mx.array | None, draws: Draws
) -> tuple[mx.array, mx.array, mx.array]:
    """The noise of the proposed tokens, of the scored ones, and of those that are near."""
    scored = bounds.scored
    known = mx.concatenate([scored.tokens, scored.ids], axis=-1)
    if near_ids is None:
        vocab_size = bounds.clustered.vocab_size
        of_near = noise_of_all(draws.keys, vocab_size)
        # The noise of a padded slot does not matter.
        known = mx.minimum(known, vocab_size - 1)
        of_known = mx.take_along_axis(of_near, known, axis=-1)
    else:
        every = noise(draws.keys, mx.concatenate([known, near_ids], axis=-1))
        of_known, of_near = mx.split(every, [known.shape[-1]], axis=-1)
    return of_known[:, :1], of_known[:, 1:], of_near


def position_key(seed: int, position: int) -> Key:
    """A position's key, two words: SplitMix64 (Steele et al. 2014) of the seed's stream."""
    value = 0
    for number in (seed, position):
        value = (value + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 32, value & 0xFFFFFFFF


def noise(keys: mx.array, token_ids: mx.array) -> mx.array:
    """Gumbel noise of tokens: keys (R, 2), ids (R, K) uint32 → (R, K) float32.

    Two neighbouring ids share a call of Threefry, which gives two words.
    """
    words = _random_words(keys, token_ids // 2)
    return _gumbel((words >> token_ids % 2 * 32).astype(mx.uint32))


def noise_of_all(keys: mx.array, vocab_size: int) -> mx.array:
    """Gumbel noise of tokens 0 … V-1: keys (R, 2) → (R, V) float32."""
    words = _random_words(keys, mx.arange(-(-vocab_size // 2), dtype=mx.uint32))
    return _gumbel(words.view(mx.uint32)[:, :vocab_size])


def _random_words(keys: mx.array, pairs: mx.array) -> mx.array:
    """Two random words for each pair of tokens, (R, K) uint64, the first one in the lower half.

    The numbers of the pairs (R, K) are added to the first words of the keys (R, 2).
    """
    keys = keys.view(mx.uint64)
    # The addition has no carry.
    first = keys.astype(mx.uint32) + pairs
    of_pairs = keys >> 32 << 32 | first.astype(mx.uint64)
    words = _two_words(of_pairs.view(mx.uint32).reshape(-1, 2))
    return words.reshape(len(keys), -1).view(mx.uint64)


_two_words = mx.vmap(lambda key: mx.random.split(key, 1))


def _gumbel(words: mx.array) -> mx.array:
    """Gumbel noise by random words, of the uniform numbers that ``mx.random.uniform`` makes."""
    uniform = mx.minimum(words.astype(mx.float32) * 2.0**-32, BELOW_ONE)
    # A uniform number of 0 gives minus infinity.
    return -mx.log(-mx.log(uniform))
