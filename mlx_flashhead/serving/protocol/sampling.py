"""The draws of a request: mlx-lm's settings, with seeds of one sequence."""

import random
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import mlx.core as mx

from ...models.compat.sample_utils import make_logits_processors
from ...models.sampling import make_sampler
from ..catalogue import ServedModel

Sampler = Callable[[mx.array], mx.array]
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
    """A sampler. Without a seed, sequences with equal settings share it, and one call of it."""
    sampler = _shared_sampler(served, sampling)
    return sampler if seed is None or sampling.temp == 0 else _Seeded(sampler, seed)


@lru_cache(maxsize=64)
def _shared_sampler(served: ServedModel, sampling: Sampling) -> Sampler:
    special = [*served.tokenizer.encode("\n"), *served.tokenizer.eos_token_ids]
    return make_sampler(**asdict(sampling), xtc_special_tokens=special, model=served.model)


class _Seeded:
    """Draws from a sequence's own seeds, independently of other sequences."""

    def __init__(self, sampler: Sampler, seed: int):
        self._sampler = sampler
        self._seeds = random.Random(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        mx.random.seed(self._seeds.getrandbits(63))
        try:
            return self._sampler(logprobs)
        finally:
            mx.random.seed(
                secrets.randbits(63)
            )  # the draws of others must not follow from the seed
