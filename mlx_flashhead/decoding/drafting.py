"""Text with a draft model: mlx-lm's speculative loop, whose target chooses every token."""

import logging
from bisect import bisect
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import Any, Unpack, cast

import mlx.core as mx

from ..models.compat import mlx_lm as compat
from ..models.install import get_flash_head
from .caches import length_of, trims
from .changes import Changes
from .keywords import CacheOptions
from .loop import verified_steps
from .policy import policy_of
from .proposer import Proposer
from .sampler import Processor, Sampler, SamplerFunction, draw_of
from .sequence import begin

LATEST = 256  # tokens of a text that a draft model's FlashHead always scores
DRAFTED = "dense: a draft model proposes, and the target chooses every token"
log = logging.getLogger("mlx_flashhead")


def drafted_steps(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    stream: Any = compat.generation_stream,
    *,
    proposer: Proposer,
    max_tokens: int = 256,
    num_draft_tokens: int = 2,
    sampler: Sampler | SamplerFunction | None = None,
    logits_processors: Iterable[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    context: Iterable[int] = (),
    announce: Callable[[str], Any] | None = None,
    **options: Unpack[CacheOptions],
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Does what mlx-lm's ``speculative_generate_step`` does, with FlashHeads.

    The target is dense: it verifies several positions in one product, which rounds otherwise than
    one position at a time. A draft model's FlashHead changes no token that the target accepts or
    chooses. It always scores the text's latest tokens, too. It serves greedy text and this
    package's samplers alone: how often mlx-lm's samplers draw from MLX's random state depends on
    the rounds. The text goes on without drafts where a cache cannot be trimmed, as past the window
    of a sliding attention, and with functions that must be called once a token.

    Args:
        prompt: Tokens (n,).
        model: The target.
        draft_model: The model that proposes tokens.
        stream: Where they compute.
        proposer: Has the settings.
        max_tokens: Tokens of the text.
        num_draft_tokens: Tokens that the draft model proposes at once.
        sampler: As for mlx-lm.
        logits_processors: As for mlx-lm.
        prompt_cache: Caches of both models, which hold the ``context`` already.
        context: Tokens that come before the prompt.
        announce: Called with how the text is decoded.
        **options: As for mlx-lm's loops, with drafts and without.

    Yields:
        Tokens, log-probabilities (V,), and whether the draft model has proposed the token.
    """
    ids = [*context, *cast(list[int], prompt.tolist())]  # and the text, as it grows
    n_before = len(ids)
    n_context = n_before - len(prompt)
    functions = list(logits_processors or ())
    caches = prompt_cache
    if not caches:
        caches = compat.make_prompt_cache(model) + compat.make_prompt_cache(draft_model)
    cache = caches[: len(model.layers)]
    length = _longest(cache)
    n_ahead = len(prompt) + num_draft_tokens + 1
    known = draw_of(sampler) is not None and Changes.of(functions) is not None
    limit = _trimmable_tokens(caches, n_ahead, max_tokens) if known else 0
    say = announce or _say_nothing
    if isinstance(sampler, Sampler):  # the same noise with drafts and without
        sampler = replace(sampler, seed=sampler.new_seed())
    # 1) mlx-lm's loop, as long as the caches can be trimmed.
    if limit > 0:
        begin(functions)
        drafted = _drafted(
            prompt,
            model,
            draft_model,
            stream,
            ids=ids,
            sampler=sampler,
            num_draft_tokens=num_draft_tokens,
            max_tokens=limit,
            logits_processors=after(ids[:-1], functions),
            prompt_cache=caches,
            **options,
        )
        with closing(drafted):
            for step in drafted:
                say(DRAFTED)
                yield step
        if len(ids) == n_before + max_tokens:
            return
    else:
        _log_once_without_drafts()
    # 2) The rest of the text without drafts. A token that the cache lacks is fed first.
    n_held = n_context + _longest(cache) - length
    if n_held == len(ids):
        compat.trim_prompt_cache(cache, 1)
        n_held -= 1
    steps = verified_steps(
        mx.array(ids[n_held:], dtype=prompt.dtype),
        model,
        stream,
        proposer=proposer,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=functions,
        prompt_cache=cache,
        context=ids[:n_held],
        n_begun=len(ids) - n_before,
        announce=announce,
        **options,
    )
    with closing(steps):
        for token, logprobs in steps:
            yield token, cast(mx.array, logprobs), False
    caches[: len(cache)] = cache  # its layers may have been quantized on the way


def _say_nothing(mode: str) -> None:
    """Stands in the place of a callback that nobody gave."""


def _trimmable_tokens(caches: list[Any], n_ahead: int, max_tokens: int) -> int:
    """How many of ``max_tokens`` can be drafted while all caches can be trimmed."""

    def cannot_trim(n_tokens: int) -> bool:
        return not all(trims(layer, ahead=n_ahead + n_tokens) for layer in caches)

    return bisect(range(1, max_tokens + 1), 0, key=cannot_trim)


def _drafted(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    stream: Any,
    *,
    ids: list[int],
    sampler: Any,
    num_draft_tokens: int,
    max_tokens: int,
    **options: Any,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """mlx-lm's loop, whose tokens are appended to ``ids``, with the draft model's FlashHead."""
    head = cast(Any, get_flash_head(draft_model))
    settings = draw_of(sampler)
    greedy = settings is not None and settings.greedy
    # a target that drafts for itself is dense
    drafts = head is not None and head is not get_flash_head(model)
    drafts = drafts and (greedy or isinstance(sampler, Sampler))
    hook = sampler
    places = _Places(len(ids), num_draft_tokens, max_tokens)
    if isinstance(sampler, Sampler):
        hook = None if greedy else partial(_draw_at_places, sampler, places, ids)

    def project(hidden: mx.array) -> mx.array:
        latest = mx.array(sorted(set(ids[-LATEST:])), dtype=mx.uint32)
        return cast(
            mx.array, head.draft_logits(hidden, latest, n_probes=policy_of(head).draft_probes)
        )

    steps: Any = compat.speculative_generate_step(
        prompt,
        model,
        draft_model,
        stream,
        max_tokens=max_tokens,
        num_draft_tokens=num_draft_tokens,
        sampler=hook,
        **options,
    )
    with closing(steps):
        while True:
            # a token at a time, since streams may take turns
            with head.intercepted(project) if drafts else nullcontext():
                step = next(steps, None)
            if step is None:
                return
            ids.append(step[0])
            places.n_rows = 0
            yield step


class _Places:
    """Where in the text a round draws: its drafts, then the target's choices."""

    def __init__(self, n_before: int, num_draft_tokens: int, max_tokens: int):
        self._n_before = n_before
        self._num_draft_tokens = num_draft_tokens
        self._max_tokens = max_tokens
        self.n_rows = 0  # of this round

    def next(self, n_rows: int, n_ids: int) -> int:
        """The place of the first of the next rows, where the text has ``n_ids`` tokens."""
        n_given = n_ids - self._n_before
        n_drafts = min(self._max_tokens - n_given, self._num_draft_tokens)
        first = self.n_rows if self.n_rows < n_drafts else self.n_rows - n_drafts
        self.n_rows += n_rows
        return n_given + first


def _draw_at_places(
    sampler: Sampler, places: _Places, ids: list[int], logprobs: mx.array
) -> mx.array:
    """Draws tokens of rows (..., V) with the noise of each one's place in the text."""
    rows = logprobs.reshape(-1, 1, logprobs.shape[-1])
    first = places.next(len(rows), len(ids))
    seed = cast(int, sampler.seed)
    return mx.concatenate([sampler.choose(row, seed, first + i) for i, row in enumerate(rows)])


def after(context: list[int], processors: Iterable[Processor]) -> list[Processor]:
    """Processors that see the tokens ``context`` before those of the loop."""
    if not context:
        return list(processors)
    prefix = mx.array(context)

    def process(processor: Processor, tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([prefix.astype(tokens.dtype), tokens]), logits)

    return [partial(process, processor) for processor in processors]


def _longest(cache: list[Any]) -> int:
    return max((length_of(layer) or 0 for layer in cache), default=0)


@once
def _log_once_without_drafts() -> None:
    log.warning(
        "This text is generated without drafts: a cache of this model cannot be trimmed as drafts "
        "need it, or a sampler or processor must be called once a token."
    )


def draft_report(draft_model: Any, n_tokens: int) -> str:
    """What was drafted, for a line under a text.

    Args:
        draft_model: The draft model, with a FlashHead or without.
        n_tokens: The text's tokens that it has proposed.
    """
    drafted = f"Drafts: {n_tokens:,} tokens of the text"
    head = get_flash_head(draft_model)
    if head is None:
        return f"{drafted}, by a draft model without a FlashHead"
    probes = policy_of(head).draft_probes or head.n_probes
    return f"{drafted}. FlashHead drafted, {probes:,} of {head.n_clusters:,} clusters a draft"
