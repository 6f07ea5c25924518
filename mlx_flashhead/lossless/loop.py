"""The loops for one text: mlx-lm's own, started again where a check chooses another token."""

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head.flash_head import FlashHead
from ..models.compat.cache import make_prompt_cache
from ..models.compat.generate import (
    generate_step,
    generation_stream,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from ..models.install import get_flash_head
from .proposals import Proposer
from .rollback import Mark, go_back, kept, length_of
from .sampler import Sampler
from .sequence import ForeignSampler, Processor, Text, begin
from .verify import Pace

LATEST = 256  # tokens of a text that a draft model's FlashHead always scores

Tokens = Generator[tuple[int, mx.array | None], None, None]


def verified_steps(
    prompt: mx.array,
    model: nn.Module,
    stream: Any = generation_stream,
    *,
    proposer: Proposer,
    max_tokens: int = 256,
    sampler: ForeignSampler | None = None,
    logits_processors: Sequence[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    logprobs: bool = True,
    context: Sequence[int] = (),
    n_begun: int = 0,
    **options: Any,
) -> Tokens:
    """mlx-lm's ``generate_step`` with the dense model's choices: tokens, and wanted logprobs (V,).

    ``max_tokens`` of -1 is no limit. ``prompt_cache`` holds the tokens ``context`` already, and all
    confirmed ones at the end. The last ``n_begun`` of these are of this text, which is continued.
    ValueError if a cache can neither be trimmed nor kept, or as ``generate_step``.
    """
    cache = make_prompt_cache(model, max_kv_size) if prompt_cache is None else prompt_cache
    tokens = [*context, *cast(list[int], prompt.tolist())]
    before, begun = tokens[: len(tokens) - n_begun], tokens[len(tokens) - n_begun :]
    processors = logits_processors or ()
    text = Text(sampler, processors, before, logprobs, limit=max_tokens, tokens=begun)
    kv_bits, group_size = options.get("kv_bits"), options.get("kv_group_size", 64)
    quantized_from = options.get("quantized_kv_start", 0)

    def marks(_: Sequence[Text]) -> list[Mark]:
        layers = kept(cache, None if kv_bits is None else quantized_from)
        return [Mark(text.n_held, layers, [length_of(layer) for layer in cache])]

    def feed(token: list[int]) -> None:
        """Feeds a confirmed token to the model, as mlx-lm's loop has done before."""
        with mx.stream(stream):
            model(mx.array([token], dtype=mx.uint32), cache=cache)
            maybe_quantize_kv_cache(cache, quantized_from, group_size, kv_bits)
            mx.eval([layer.state for layer in cache])

    def take(logprobs: mx.array) -> mx.array:
        token = hooks["sampler"](logprobs)
        proposer.texts = [text]
        return token

    pace, start, before = Pace(proposer, marks), prompt, list(context)
    try:
        while text.n_given != text.limit:
            hooks = proposer.hooks(text, before)
            options |= hooks | {"sampler": take, "max_tokens": -1, "prompt_cache": cache}
            proposer.texts = None  # the prompt's last position is dense, as is the first one here
            with closing(generate_step(start, model, stream, **options)) as steps:
                yield from _until_refused(steps, text, proposer, pace)
            if text.n_given == text.limit:
                return
            go_back(cache, text.mark, text, text.n_given - 1, feed)
            for name in ("input_embeddings", "prompt_progress_callback"):
                options.pop(name, None)
            *before, last = text.prompt + text.tokens
            start = mx.array([last], dtype=mx.uint32)
    finally:
        if prompt_cache is not None and text.mark is not None:
            go_back(cache, text.mark, text, text.n_given, feed)


def _until_refused(steps: Generator, text: Text, proposer: Proposer, pace: Pace) -> Tokens:
    """The tokens up to one that a check has chosen instead of the proposal."""
    while not text.refused:
        with proposer.in_place():
            token, _ = next(steps)
        text.read(token)
        for _, positions in pace.confirmed([text], [text]):
            for position in positions:
                text.n_given += 1
                yield cast(int, position.token), position.logprobs
                if text.n_given == text.limit:
                    return


def drafted_steps(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    *arguments: Any,
    proposer: Proposer,
    context: Sequence[int] = (),
    **options: Any,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """mlx-lm's ``speculative_generate_step`` with a dense target; caches hold the ``context``
    already.

    Drafts and the target's choices are drawn with the noise of their position, so that the text is
    that without drafts. A draft model's FlashHead also scores the text's latest tokens.
    """
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
