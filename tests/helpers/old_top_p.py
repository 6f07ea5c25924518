"""The samplers of mlx-lm 0.31 and oMLX with top-p: mlx-lm 0.31.3's own text, for any version."""

import mlx.core as mx
from mlx_lm import sample_utils

HAS_OLD_TOP_P = not hasattr(sample_utils, "greedy_sampler")


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    probs = mx.exp(logprobs)
    # Sort in ascending order.
    sorted_indices = mx.argsort(logprobs, axis=-1)
    sorted_probs = mx.take_along_axis(probs, sorted_indices, axis=-1)

    cumulative_probs = mx.cumsum(sorted_probs, axis=-1)

    # Rearrange cumulative probs back to original order.
    inverse_indices = mx.put_along_axis(
        mx.zeros_like(sorted_indices),
        sorted_indices,
        mx.arange(sorted_indices.shape[-1], dtype=sorted_indices.dtype),
        axis=-1,
    )
    cumulative_probs = mx.take_along_axis(cumulative_probs, inverse_indices, axis=-1)

    # Select tokens with cumulative probs below threshold.
    return mx.where(
        cumulative_probs > 1 - top_p,
        logprobs,
        -float("inf"),
    )


def make_sampler(temp: float, top_p: float, min_p: float = 0.0, top_k: int = 0):
    """As 0.31's of that name: its top-p, then the filters that versions share."""
    sampling_methods = [lambda x: apply_top_p(x, top_p)]
    if min_p != 0.0:
        sampling_methods.append(lambda x: sample_utils.apply_min_p(x, min_p, 1))
    if top_k > 0:
        sampling_methods.append(lambda x: sample_utils.apply_top_k(x, top_k))

    def sampler(logprobs):
        for method in sampling_methods:
            logprobs = method(logprobs)
        return mx.random.categorical(logprobs * (1 / temp))

    return sampler
