"""Samplers on the same logits: mlx-lm's on the whole vocabulary, and this package's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.timing import Spread, in_turns, on_batch
from ..head.flash_head import FlashHead
from ..lossless.sampler import make_sampler

MLX_LM, OURS = "mlx-lm", "FlashHead"
SAMPLERS: dict[str, dict[str, Any]] = {
    "top-p 0.95": {"temp": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temp": 0.8, "min_p": 0.05},
    "top-k 40": {"temp": 0.8, "top_k": 40},
    "all three": {"temp": 0.8, "top_p": 0.95, "min_p": 0.05, "top_k": 40},
}
ZIPF_EXPONENT = 1.1


def zipf_logprobs(vocab_size: int, n_positions: int, number: int) -> mx.array:
    """Log-probabilities in random order, as steep as those of words in a text.

    Args:
        vocab_size: Tokens V.
        n_positions: Positions R.
        number: Number of the draw, its seed.

    Returns:
        (R, V) float32, normalised.
    """
    rng = np.random.default_rng(number)
    ranks = np.stack([rng.permutation(vocab_size) for _ in range(n_positions)]) + 1
    logits = mx.array(-ZIPF_EXPONENT * np.log(ranks)).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def sampler_benchmark(
    head: FlashHead,
    *,
    n_positions: int = 1,
    rounds: int = 20,
    progress: bool = True,
    description: str = "Timing samplers",
) -> dict:
    """Times each sampler of ``SAMPLERS`` in both forms, all in turns, on other logits each round.

    Args:
        head: The head whose clusters are used.
        n_positions: Positions at once: the batch.
        rounds: Runs that count.
        progress: Show a bar.
        description: Of the bar.

    Returns:
        Shapes, milliseconds and ratios, JSON-ready.
    """
    batches = [zipf_logprobs(head.vocab_size, n_positions, number) for number in range(rounds + 1)]
    mx.eval(batches)
    runs: dict[tuple[str, str], Callable[[int], mx.array]] = {}
    for name, arguments in SAMPLERS.items():
        forms = {
            MLX_LM: make_sampler(**arguments),  # without a head: mlx-lm's own
            OURS: make_sampler(**arguments, model=head),
        }
        runs |= {
            (name, form): partial(on_batch, sampler, batches) for form, sampler in forms.items()
        }
    seconds = in_turns(runs, rounds, progress=progress, description=description)
    spreads = {run: Spread.of(taken).scaled(1000) for run, taken in seconds.items()}
    return {
        "vocab_size": head.vocab_size,
        "n_clusters": head.n_clusters,
        "cluster_size": head.cluster_size,
        "n_probes": head.n_probes,
        "positions": n_positions,
        "ms": {
            name: {form: spreads[name, form].to_dict() for form in (MLX_LM, OURS)}
            for name in SAMPLERS
        },
        "times_faster": {
            name: spreads[name, MLX_LM].median / spreads[name, OURS].median for name in SAMPLERS
        },
    }
