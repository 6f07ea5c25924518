"""mlx-lm's loop with a draft model. Drafts and the target's choices are drawn with the noise of
their position, so that the text is that without drafts. Processors see both."""

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


def drafted_steps(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    *arguments: Any,
    proposer: Proposer,
    context: Sequence[int] = (),
    **options: Any,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """mlx-lm's ``speculative_generate_step`` with the package's draws and a dense target. The
    caches hold the tokens ``context`` already. A draft model's FlashHead also scores the text's
    latest tokens."""
    begin(options.get("logits_processors"))
    sampler: Any = options.get("sampler")
    max_tokens, num_draft = options.get("max_tokens", 256), options.get("num_draft_tokens", 2)
    n_given = n_rows = 0  # tokens, and rows of this round: its drafts, then the target's choices

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal n_rows
        n_drafts = min(max_tokens - n_given, num_draft)
        first = n_given + (n_rows if n_rows < n_drafts else n_rows - n_drafts)
        rows = logprobs.reshape(-1, 1, logprobs.shape[-1])
        n_rows += len(rows)
        tokens = [sampler.choose(row, seed, first + i) for i, row in enumerate(rows)]
        return mx.concatenate(tokens)

    if isinstance(sampler, Sampler) and not sampler.settings.greedy:
        seed, options["sampler"] = sampler.text_seed(), draw
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
            n_given, n_rows = n_given + 1, 0
            yield step
