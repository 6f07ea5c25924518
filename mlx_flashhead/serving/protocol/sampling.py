"""The draws of a request: mlx-lm's settings, with seeds of one sequence."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import mlx.core as mx

from ...lossless.sampler import Sampler, make_sampler
from ...models.compat.sample_utils import make_logits_processors
from ..catalogue import ServedModel

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """The settings of mlx-lm's sampler, by its names."""

    temp: float
    top_p: float
    top_k: int
    min_p: float
    xtc_probability: float
    xtc_threshold: float


@dataclass(frozen=True)
class Penalties:
    """The settings of mlx-lm's logits processors, by its names; the bias as pairs."""

    logit_bias: tuple[tuple[int, float], ...]
    repetition_penalty: float
    repetition_context_size: int
    presence_penalty: float
    presence_context_size: int
    frequency_penalty: float
    frequency_context_size: int

    def processors(self) -> list[LogitsProcessor]:
        """The processors with these settings."""
        settings = asdict(self) | {"logit_bias": dict(self.logit_bias) or None}
        return make_logits_processors(**settings)


def sampler_for(served: ServedModel, sampling: Sampling, seed: int | None) -> Sampler:
    """A sampler; without a seed every sequence gets one of its own."""
    special = [*served.tokenizer.encode("\n"), *served.tokenizer.eos_token_ids]
    return make_sampler(**asdict(sampling), xtc_special_tokens=special, seed=seed)
