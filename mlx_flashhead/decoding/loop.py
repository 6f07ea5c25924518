"""The loop of one sequence, verified, and what other loops become: dense, unverified, drafted."""

import logging
from bisect import bisect
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat import mlx_lm as compat
from ..models.install import get_flash_head
from .caches import Snapshot, copied_layers, length_of, rollback, trims
from .policy import Proposer, policy_of, step_arrays
from .sampler import (
    Processor,
    Sampler,
    SamplerFunction,
    Trust,
    current_random_state,
    set_random_state,
    trust,
)
from .schedule import VerifyScheduler
from .sequence import PendingToken, Sequence, begin

LATEST = 256  # tokens of a text that a draft model's FlashHead always scores
CLEAR_EVERY = 256  # tokens, as mlx-lm's loop

Tokens = Generator[tuple[int, mx.array | None], None, None]
log = logging.getLogger("mlx_flashhead")


def verified_steps(
    prompt: mx.array,
    model: nn.Module,
    stream: Any = compat.generation_stream,
    *,
    proposer: Proposer,
    max_tokens: int = 256,
    sampler: Sampler | SamplerFunction | None = None,
    logits_processors: Iterable[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    logprobs: bool = True,
    context: Iterable[int] = (),
    n_begun: int = 0,
    prefill: Callable[..., Iterable[Any]] | None = None,
    **options: Any,
) -> Tokens:
    """mlx-lm's ``generate_step`` with the dense model's choices: tokens, and wanted logprobs (V,).
    What cannot be verified is decoded by the normal (dense) head, or the unverified one.

    ``max_tokens`` of -1 is no limit. ``prompt_cache`` holds the tokens ``context`` already, of
    which ``n_begun`` belong to a text that is continued, and at the end all tokens handed out.
    ``prefill`` reads the prompt instead of mlx-lm's loop, with its keywords. ValueError if a cache
    can neither be trimmed nor copied, or as ``generate_step``.
    """
    before = [*context, *cast(list[int], prompt.tolist())]
    n_prompt, functions = len(before) - n_begun, logits_processors or ()
    how: Any = {"logprobs": logprobs, "limit": max_tokens, "tokens": before[n_prompt:]}
    sequence = Sequence(sampler, functions, before[:n_prompt], **how)
    verifies = proposer.can_verify(sequence)
    cache = compat.make_prompt_cache(model, max_kv_size) if prompt_cache is None else prompt_cache
    options |= {"prompt_cache": cache}
    if not len(prompt):  # embeddings alone, of which processors see nothing
        hooks = {"sampler": sampler, "logits_processors": functions, "max_tokens": max_tokens}
        steps: Any = compat.generate_step(prompt, model, stream, **(options | hooks))
        yield from steps
        return
    bits, quantized_from = options.get("kv_bits"), options.get("quantized_kv_start", 0)
    quantization = quantized_from, options.get("kv_group_size", 64), bits

    def feed(token: mx.array) -> mx.array:
        with mx.stream(stream):
            logits = model(token, cache=cache)
            compat.maybe_quantize_kv_cache(cache, *quantization)
            return logits

    def rollback_to(target: int) -> None:
        rollback(cache, sequence, sequence.n_cached, target, feed)
        sequence.n_cached, sequence.rejected = target, False

    def snapshot(_: list[Sequence]) -> list[Snapshot]:
        layers = copied_layers(cache, None if bits is None else quantized_from)
        return [Snapshot(sequence.n_cached, layers, [length_of(layer) for layer in cache])]

    scheduler, accepted = VerifyScheduler(proposer, snapshot), list[PendingToken]()
    sequence.n_cached = n_begun
    try:
        # 1) Prefill: mlx-lm's loop reads the prompt, and its last logits choose the first token.
        prefill = prefill or partial(compat.generate_step, prompt, model, stream)
        with proposer.states() if proposer.unverified else nullcontext():
            latest = _first_token(prefill, sequence, options)
        while sequence.n_yielded != sequence.limit:
            with mx.stream(stream):
                # 2) The body: the state of the latest token is taken where the head is called.
                sequence.n_cached += 1
                with proposer.states() as states:
                    logits = feed(latest[None])[:, -1]
                # 3) The head proposes the next token, which the device begins to compute.
                if verifies:
                    proposed, chosen = proposer.propose([sequence], states[-1][:, -1], latest)
                else:
                    proposed, chosen = sequence.extend(logits, latest), sequence.pending[-1:]
                mx.async_eval(step_arrays(proposed, chosen), scheduler.joined)
                # 4) The latest token is read. It is sure, or is verified when that is due.
                current = sequence.pending[sequence.n_read]
                if current not in chosen:  # else, after a rollback, it is read already
                    current.read(cast(int, latest.item()))
                    for _, tokens in scheduler.step([sequence], [sequence]):
                        accepted += tokens
            # 5) Accepted tokens are handed out.
            while accepted:
                pending = accepted.pop(0)
                sequence.n_yielded += 1
                yield cast(int, pending.token), pending.logprobs
                if sequence.n_yielded % CLEAR_EVERY == 0:
                    mx.clear_cache()
                if sequence.n_yielded == sequence.limit:
                    return
            # 6) After a rejected token, the caches roll back and its place is the dense choice's.
            latest = proposed
            if sequence.rejected:
                rollback_to(len(sequence.tokens) - 1)
                latest = mx.array(sequence.tokens[-1:], dtype=mx.uint32)
    finally:
        if sequence.snapshot is not None:
            if prompt_cache is not None:
                rollback_to(sequence.n_yielded)
            if sequence.uses_random_state:  # as mlx-lm's loop leaves it, a token further
                ahead = [*accepted, *sequence.pending]
                drawn = ahead[0].random_state if ahead else None
                later = mx.random.split(current_random_state())[0] if drawn is None else drawn[1]
                set_random_state(later)


def _first_token(
    prefill: Callable[..., Iterable[Any]], sequence: Sequence, options: dict[str, Any]
) -> mx.array:
    """Reads the prompt. Returns the first token (1,), which is pending."""
    token = mx.array([0])

    def take_logits(_: mx.array, logits: mx.array) -> mx.array:
        nonlocal token
        token = sequence.extend(logits)
        return logits

    # with a limit of 0, mlx-lm's loop reads the prompt and calls these once
    hooks = {"logits_processors": [take_logits], "sampler": lambda _: token, "max_tokens": 0}
    for _ in prefill(**(options | hooks)):
        pass
    return token


def after(context: list[int], processors: Iterable[Processor]) -> list[Processor]:
    """Processors that see the tokens ``context`` before those of the loop."""
    if not context:
        return list(processors)
    prefix = mx.array(context, dtype=mx.uint32)

    def process(processor: Processor, tokens: mx.array, logits: mx.array) -> mx.array:
        return processor(mx.concatenate([prefix, tokens.astype(mx.uint32)]), logits)

    return [partial(process, processor) for processor in processors]


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
    **options: Any,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """mlx-lm's ``speculative_generate_step`` with the text that it would have without drafts;
    caches hold the ``context`` already.

    The target is dense: it verifies several positions in one product. A draft model's FlashHead
    also scores the text's latest tokens. Where a cache cannot be trimmed, as past the window of a
    sliding attention, and for functions that are called once a token, the text goes on without.
    """
    ids = [*context, *cast(list[int], prompt.tolist())]  # and the text, as it grows
    n_before, n_context = len(ids), len(ids) - len(prompt)
    functions = list(logits_processors or ())
    caches = prompt_cache or compat.make_prompt_cache(model) + compat.make_prompt_cache(draft_model)
    cache = caches[: len(model.layers)]
    # 1) Drafts end where a cache could not be trimmed any more.

    def cannot_trim(n_tokens: int) -> bool:
        ahead = len(prompt) + num_draft_tokens + n_tokens + 1
        return not all(trims(layer, ahead=ahead) for layer in caches)

    known = trust(sampler, functions) is not Trust.UNKNOWN
    limit = bisect(range(1, max_tokens + 1), 0, key=cannot_trim) if known else 0
    if isinstance(sampler, Sampler):  # the same noise with drafts and without
        sampler = replace(sampler, seed=sampler.new_seed())
    length = _longest(cache)
    if limit > 0:
        # 2) mlx-lm's loop. Its sampler draws with the noise of each token's place in the text.
        n_rows = 0  # of this round: its drafts, then the target's choices

        def draw(logprobs: mx.array) -> mx.array:
            nonlocal n_rows
            n_given = len(ids) - n_before
            n_drafts = min(limit - n_given, num_draft_tokens)
            first = n_given + (n_rows if n_rows < n_drafts else n_rows - n_drafts)
            rows, ours = logprobs.reshape(-1, 1, logprobs.shape[-1]), cast(Sampler, sampler)
            n_rows += len(rows)
            seed = cast(int, ours.seed)
            return mx.concatenate([ours.choose(row, seed, first + i) for i, row in enumerate(rows)])

        def project(hidden: mx.array) -> mx.array:
            latest = mx.array(sorted(set(ids[-LATEST:])), dtype=mx.uint32)
            return head.draft_logits(hidden, latest, n_probes=policy_of(head).draft_probes)

        hook = sampler
        if isinstance(sampler, Sampler):
            hook = None if sampler.settings.greedy else draw
        head = cast(Any, get_flash_head(draft_model))
        # a target that drafts for itself is dense
        drafts = head is not None and head is not get_flash_head(model)
        begin(functions)
        steps: Any = compat.speculative_generate_step(
            prompt,
            model,
            draft_model,
            stream,
            max_tokens=limit,
            num_draft_tokens=num_draft_tokens,
            sampler=hook,
            logits_processors=after(ids[:-1], functions),
            prompt_cache=caches,
            **options,
        )
        with closing(steps):
            while True:
                # a token at a time, since streams may take turns
                with head.intercepted(project) if drafts else nullcontext():
                    step = next(steps, None)
                if step is None:
                    break
                ids.append(step[0])
                n_rows = 0
                yield step
        if len(ids) == n_before + max_tokens:
            return
    else:
        _log_once_without_drafts()
    # 3) The rest of the text without drafts. A token that the cache lacks is fed first.
    n_held = n_context + _longest(cache) - length
    if n_held == len(ids):
        compat.trim_prompt_cache(cache, 1)
        n_held -= 1
    steps = verified_steps(
        mx.array(ids[n_held:], dtype=mx.uint32),
        model,
        stream,
        proposer=proposer,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=functions,
        prompt_cache=cache,
        context=ids[:n_held],
        n_begun=len(ids) - n_before,
        **options,
    )
    with closing(steps):
        for token, logprobs in steps:
            yield token, logprobs, False


def _longest(cache: list[Any]) -> int:
    return max((length_of(layer) or 0 for layer in cache), default=0)


@once
def _log_once_without_drafts() -> None:
    log.warning(
        "This text is generated without drafts: a cache of this model cannot be trimmed as drafts "
        "need it, or a sampler or processor must be called once a token."
    )
