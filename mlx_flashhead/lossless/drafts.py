"""mlx-lm's loop with a draft model.

Its sampler is called for drafts and for the target's choices. Both draw with the noise of their
position, so that a draft is accepted wherever the two distributions agree, and the text is that
without drafts. Its processors see both as well: a grammar masks the drafts too.
"""

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from typing import Any, cast

import mlx.core as mx

from ..head.flash_head import FlashHead
from ..models.compat.generate import speculative_generate_step
from ..models.install import get_flash_head
from .proposals import Proposer
from .sampler import Sampler
from .text import begin

LATEST = 256  # tokens of a text


class _DraftSampler:
    """The package's sampler, at the positions of mlx-lm's speculative loop."""

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
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    *arguments: Any,
    proposer: Proposer,
    context: Sequence[int] = (),
    **options: Any,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """mlx-lm's ``speculative_generate_step`` with the package's draws and a dense target.

    A draft model's FlashHead also scores the latest tokens of the text, which come again more often
    than others.

    Args:
        prompt: (n,) token ids.
        proposer: Has the settings of the head of ``model``, the target.
        context: Tokens that the caches hold already.
    """
    begin(options.get("logits_processors"))
    sampler, draws = options.get("sampler"), None
    if isinstance(sampler, Sampler) and not sampler.settings.greedy:
        draws = options["sampler"] = _DraftSampler(
            sampler, options.get("max_tokens", 256), options.get("num_draft_tokens", 2)
        )
    head = get_flash_head(draft_model)
    if head is get_flash_head(model):
        head = None  # it is the target's, which is dense
    latest = deque([*context, *cast(list[int], prompt.tolist())], LATEST)

    def project(head: FlashHead, hidden: mx.array) -> mx.array:
        return head.draft_logits(hidden, mx.array(sorted(set(latest)), dtype=mx.uint32))

    steps: Any = speculative_generate_step(prompt, model, draft_model, *arguments, **options)
    with closing(steps):
        while True:
            drafts = nullcontext() if head is None else head.settings(project=project)
            with proposer.with_draft(), drafts:  # a token at a time, since streams may take turns
                step = next(steps, None)
            if step is None:
                return
            latest.append(step[0])
            if draws is not None:
                draws.given()
            yield step
