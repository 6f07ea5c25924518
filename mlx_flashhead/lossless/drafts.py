"""Draws in mlx-lm's loop with a draft model.

Its sampler is called for drafts and for the target's choices. Both draw with the noise of their
position, so that a draft is accepted wherever the two distributions agree, and the text is that
without drafts.
"""

from collections.abc import Generator
from functools import partial
from typing import Any

import mlx.core as mx

from ..models.compat.generate import speculative_generate_step
from .sampler import Sampler
from .text import begin


class _DraftSampler:
    """The package's sampler, at the positions of mlx-lm's speculative loop.

    Args:
        sampler: The sampler.
        max_tokens: Of the text.
        num_draft_tokens: Drafts of a round, at most.
    """

    def __init__(self, sampler: Sampler, max_tokens: int, num_draft_tokens: int):
        self._sampler, self._seed = sampler, sampler.text_seed()
        self._max_tokens, self._num_draft = max_tokens, num_draft_tokens
        self.n_given = 0
        self._n_calls = 0  # single rows of this round: its drafts, then the target's choices

    def __call__(self, logprobs: mx.array) -> mx.array:
        rows = logprobs.reshape(-1, logprobs.shape[-1])
        n_drafts = min(self._max_tokens - self.n_given, self._num_draft)
        place = self._n_calls if self._n_calls < n_drafts else self._n_calls - n_drafts
        tokens = [
            self._sampler.choose(rows[i : i + 1], self._seed, self.n_given + place + i)
            for i in range(len(rows))
        ]
        self._n_calls += len(rows)
        return mx.concatenate(tokens)

    def given(self) -> None:
        """A token has been given out, so a round has ended."""
        self.n_given += 1
        self._n_calls = 0


def drafted_steps(
    prompt: mx.array, model: Any, draft_model: Any, *arguments: Any, **options: Any
) -> Generator[tuple[Any, mx.array, bool], None, None]:
    """mlx-lm's ``speculative_generate_step`` with the package's draws."""
    begin(options.get("logits_processors"))
    sampler = options.get("sampler")
    steps = partial(speculative_generate_step, prompt, model, draft_model, *arguments)
    if not isinstance(sampler, Sampler) or sampler.settings.greedy:
        yield from steps(**options)
        return
    draws = _DraftSampler(
        sampler, options.get("max_tokens", 256), options.get("num_draft_tokens", 2)
    )
    for step in steps(**options | {"sampler": draws}):
        draws.given()
        yield step
