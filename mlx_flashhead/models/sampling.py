"""Samplers on a few thousand candidates. mlx-lm's samplers sort the whole vocabulary.

Top-p, min-p and top-k keep the likeliest tokens only. The sampler first picks the clusters that
hold the likeliest tokens, which needs no sort. It then gives their tokens to mlx-lm's functions.

It picks the clusters by the log-probabilities that it receives. A logit_bias, penalties, grammars
and a softcap therefore count, and the sampler keeps no state between calls. Draft models, batches
and shared samplers work too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import sample_utils

from ..head.flash_head import FlashHead
from .install import get_flash_head

# With clusters of 16 tokens these are 8,192 candidates, which cost little beside one pass over V.
# docs/quality.md compares the samplers' distributions with 512 and 256 clusters.
MIN_CLUSTERS = 512


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
    model: nn.Module | FlashHead | None = None,
) -> Callable[[mx.array], mx.array]:
    """``mlx_lm.sample_utils.make_sampler``, faster for a model with a FlashHead.

    With top-p, min-p or top-k it draws from the candidates: the tokens of the max(n_probes, 512)
    clusters with the likeliest tokens. As many of the likeliest tokens as there are such clusters
    are certainly candidates. All other tokens are the tail. Its mass counts where top-p adds up
    probabilities and where XTC compares them.

    The distribution is exactly mlx-lm's if all tokens that mlx-lm would keep are candidates.
    Otherwise the sampler never draws the rest of them, and the distribution differs from mlx-lm's
    by at most their mass.

    In these cases it is mlx-lm's own sampler, draw for draw: greedy decoding; temperature or XTC
    alone, which sort nothing; a head that scores every token; logits of another vocabulary; a
    top_k or min_tokens_to_keep larger than the number of clusters; vocabularies of which the
    candidates would be more than half.

    The same seed gives the same tokens again. mlx-lm's sampler draws others with the same seed.

    Args:
        temp: Temperature; 0 takes the likeliest token.
        top_p: Keep the likeliest tokens that together have this probability; 0 or 1 keeps all.
        min_p: Keep tokens of at least this share of the likeliest one's probability.
        min_tokens_to_keep: Min-p keeps at least this number of tokens.
        top_k: Keep this number of likeliest tokens; 0 keeps all.
        xtc_probability: How often XTC is applied.
        xtc_threshold: Probability above which XTC removes all tokens but the least likely one.
        xtc_special_tokens: Tokens that XTC leaves alone.
        model: The model that makes the logits, or its FlashHead. Without a FlashHead this is
            mlx-lm's sampler.

    Returns:
        A function of log-probabilities (..., V) that returns token ids (...).
    """
    whole = sample_utils.make_sampler(
        temp,
        top_p=top_p,
        min_p=min_p,
        min_tokens_to_keep=min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=xtc_special_tokens,
    )
    head = get_flash_head(model) if isinstance(model, nn.Module) else model
    has_top_p, has_min_p = 0 < top_p < 1, min_p != 0
    if head is None or temp == 0 or not (has_top_p or has_min_p or top_k > 0):
        return whole
    needed = max(top_k, min_tokens_to_keep if has_min_p else 0)
    special = list(xtc_special_tokens or ())
    xtc = (xtc_probability, xtc_threshold)

    # compiled: half as many operations, each of which MLX schedules by itself
    @partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
    def draw(rows: mx.array, n_clusters: int) -> mx.array:
        if xtc_probability > 0 and not (has_top_p or has_min_p):
            # XTC comes before top-k and compares shares of all tokens
            rows = sample_utils.apply_xtc(rows, *xtc, special)
        ids, kept = head.likeliest(rows, n_clusters)
        if has_top_p:
            shares: Any = top_p * _times_the_candidates(rows, kept)  # (R, 1): one for each row
            kept = sample_utils.apply_top_p(kept, shares)
        if has_min_p:
            kept = sample_utils.apply_min_p(kept, min_p, min_tokens_to_keep)
        if xtc_probability > 0 and (has_top_p or has_min_p):
            left = sample_utils.apply_xtc(kept, *xtc, [])
            kept = mx.where(_any_of(ids, special), kept, left)
        if top_k > 0:
            kept = sample_utils.apply_top_k(kept, top_k)
        drawn = sample_utils.categorical_sampling(kept, temp)
        return mx.take_along_axis(ids, drawn[:, None], axis=-1)

    def sampler(logprobs: mx.array) -> mx.array:
        n_clusters = _n_clusters(head, logprobs.shape[-1], needed)
        if n_clusters is None:
            return whole(logprobs)
        rows = logprobs.reshape(-1, logprobs.shape[-1])
        return draw(rows, n_clusters).reshape(logprobs.shape[:-1])

    return sampler


def _n_clusters(head: FlashHead, vocab_size: int, needed: int) -> int | None:
    """Clusters whose tokens are the candidates; None where the whole vocabulary is to be used."""
    n_clusters = max(head.n_probes, MIN_CLUSTERS)
    too_many = 2 * n_clusters * head.cluster_size > vocab_size
    if head.exact or too_many or needed > n_clusters or vocab_size != head.vocab_size:
        return None
    return n_clusters


def _times_the_candidates(logprobs: mx.array, kept: mx.array) -> mx.array:
    """The mass of all tokens over that of the candidates: (R, V), (R, K) → (R, 1) float32.

    In float32 the mass of all tokens is taken as 1, which saves a CPU three quarters of a sampler's
    time. In 16 bits the probabilities are rounded, so their mass is computed, as in mlx-lm. The
    result is at least 1, also for values that are not log-probabilities.
    """
    candidates = _mass(kept)
    everything = 1.0 if logprobs.dtype == mx.float32 else _mass(logprobs)
    return mx.maximum(everything / candidates, 1.0)


def _mass(logprobs: mx.array) -> mx.array:
    """Sum of the probabilities: (R, K) → (R, 1) float32."""
    return mx.exp(logprobs.astype(mx.float32)).sum(axis=-1, keepdims=True)


def _any_of(ids: mx.array, wanted: list[int]) -> mx.array:
    """Where ``ids`` (R, K) are among ``wanted``: (R, K)."""
    return (ids[..., None] == mx.array(wanted, dtype=mx.uint32)).any(axis=-1)
