"""Ways to decode a model: mlx-lm's own loops, and this package's with its FlashHead."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..decoding.batch import VerifiedBatchGenerator
from ..decoding.loop import verified_tokens
from ..decoding.proposer import Proposer
from ..decoding.sampling import Processor, make_sampler
from ..decoding.settings import DecodingSettings
from ..models.compat.mlx_lm import BatchGenerator, generate_step, sample_utils

DENSE = "dense"
FLASH_HEAD = "FlashHead"
UNVERIFIED = "unverified"


class Variant(NamedTuple):
    """A way to decode: a model, and its loops with the arguments of mlx-lm's."""

    model: nn.Module
    loop: Callable[..., Any] = generate_step
    generator: Callable[..., Any] = BatchGenerator
    make_sampler: Callable[..., Any] = sample_utils.make_sampler

    def decode(
        self,
        prompt: list[int],
        batch: int,
        n_tokens: int,
        sampling: dict[str, Any],
        make_processors: Callable[[], list[Processor]] = list,
    ) -> tuple[float, list[int]]:
        """Decodes and times it. The end of a text does not end a run.

        Args:
            prompt: Token ids.
            batch: Texts at once, all with this prompt.
            n_tokens: Tokens of each text that are timed: those after the first.
            sampling: Arguments of ``make_sampler``.
            make_processors: Makes the logits processors of a text.

        Returns:
            The mean seconds of a token, and the tokens of the first text.
        """
        sampler = self.make_sampler(**sampling)
        times: list[float] = []
        tokens: list[int] = []
        if batch == 1:
            decoded = self.loop(
                mx.array(prompt),
                self.model,
                max_tokens=n_tokens + 1,
                sampler=sampler,
                logits_processors=make_processors(),
            )
            for token, _ in decoded:
                times.append(time.perf_counter())
                tokens.append(int(token))
        else:
            generator = self.generator(self.model, sampler=sampler)
            first, *_ = generator.insert(
                [prompt for _ in range(batch)],
                [n_tokens + 1 for _ in range(batch)],
                logits_processors=[make_processors() for _ in range(batch)],
            )
            responses = generator.next_generated()
            while responses:
                times.append(time.perf_counter())
                tokens += [response.token for response in responses if response.uid == first]
                responses = generator.next_generated()
            generator.close()
        return (times[-1] - times[0]) / n_tokens, tokens


def with_flash_head(model: nn.Module, *, verify: bool) -> Variant:
    """This package's loops for a model with a FlashHead.

    Args:
        model: A model with a FlashHead.
        verify: Whether the dense rows verify its proposals.
    """
    proposer = Proposer(model, DecodingSettings(verify=verify))
    return Variant(
        model,
        loop=partial(verified_tokens, proposer=proposer, logprobs=False),
        generator=partial(VerifiedBatchGenerator, proposer=proposer, logprobs=False),
        make_sampler=make_sampler,
    )
