"""The loop of one sequence, verified, and what other loops become: dense, unverified, drafted."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..models.compat.mlx_lm import (
    generate_step,
    generation_stream,
    make_prompt_cache,
    maybe_quantize_kv_cache,
    speculative_generate_step,
    trim_prompt_cache,
)
from ..models.install import get_flash_head
from .policy import policy_of
from .proposer import Proposer, step_arrays
from .sampler import Processor, Sampler, SamplerFunction, Trust, trust
from .sequence import (
    PendingToken,
    Sequence,
    Snapshot,
    begin,
    current_random_state,
    length_of,
    rollback,
    set_random_state,
    trims,
)
from .verify import VerifyScheduler

LATEST = 256  # tokens of a text that a draft model's FlashHead always scores
CLEAR_EVERY = 256  # tokens, as mlx-lm's loop

Tokens = Generator[tuple[int, mx.array | None], None, None]
log = logging.getLogger("mlx_flashhead")


def verified_steps(
    prompt: mx.array,
    model: nn.Module,
    stream: Any = generation_stream,
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

    What cannot be verified is decoded by mlx-lm's own loop and the normal (dense) head.

    ``max_tokens`` of -1 is no limit. ``prompt_cache`` holds the tokens ``context`` already, and all
    tokens handed out at the end. The last ``n_begun`` of these belong to the text, which is
    continued. ``prefill`` reads the prompt instead of mlx-lm's loop, with its keywords. ValueError
    if a cache can neither be trimmed nor copied, or as ``generate_step``.
    """
    before = [*context, *cast(list[int], prompt.tolist())]
    begun = before[len(before) - n_begun :]
    sequence = Sequence(
        sampler,
        logits_processors or (),
        before[: len(before) - n_begun],
        logprobs=logprobs,
        limit=max_tokens,
        tokens=begun,
    )
    cache = make_prompt_cache(model, max_kv_size) if prompt_cache is None else prompt_cache
    options |= {"prompt_cache": cache}
    if not len(prompt) or not proposer.can_verify(sequence):
        yield from _plain_steps(prompt, model, stream, proposer, sequence, options, list(context))
        return
    quantize = partial(
        maybe_quantize_kv_cache,
        cache,
        options.get("quantized_kv_start", 0),
        options.get("kv_group_size", 64),
        options.get("kv_bits"),
    )
    quantized_from = quantize.args[1] if options.get("kv_bits") is not None else None

    def feed(token: mx.array) -> mx.array:
        """The model's logits (1, V) after a token (1,) of the text."""
        sequence.n_cached += 1
        logits = model(token[None], cache=cache)
        quantize()
        return logits[:, -1, :]

    def replay(token: list[int]) -> None:
        with mx.stream(stream):
            model(mx.array([token], dtype=mx.uint32), cache=cache)
            quantize()
            mx.eval([layer.state for layer in cache])

    def snapshot(_: list[Sequence]) -> list[Snapshot]:
        return [Snapshot.take(cache, sequence.n_cached, quantized_from)]

    def rollback_to(target: int) -> None:
        n_right = min(sequence.n_cached, len(sequence.tokens) - sequence.rejected)
        rollback(
            cache, sequence.snapshot, sequence.tokens,
            n_cached=sequence.n_cached, n_right=n_right, target=target, replay=replay,
        )  # fmt: skip
        sequence.n_cached, sequence.rejected = target, False

    scheduler = VerifyScheduler(proposer, snapshot)
    sequence.n_cached = len(begun)
    try:
        # 1) Prefill: mlx-lm's loop reads the prompt, and the dense logits choose the first token.
        prefill = prefill or partial(generate_step, prompt, model, stream)
        latest = _first_token(prefill, sequence, options)
        while sequence.n_yielded != sequence.limit:
            with mx.stream(stream):
                # 2) The body: the state of the latest token is taken where the head is called.
                with proposer.states() as states:
                    feed(latest)
                hidden = states[-1][:, -1]
                # 3) The head proposes the next token, which the device begins to compute.
                proposed, chosen = proposer.propose([sequence], hidden, latest)
                mx.async_eval(step_arrays(proposed, chosen))
                # 4) The latest token is read. It is sure, or is verified when that is due.
                if sequence.pending[sequence.n_read] not in chosen:
                    sequence.pending[sequence.n_read].read(cast(int, latest.item()))
                    outcome = list(scheduler.step([sequence], [sequence]))
                else:  # after a rollback, it is read already
                    outcome = []
            # 5) Accepted tokens are handed out.
            for _, accepted in outcome:
                for pending in accepted:
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
            _leave_random_state(sequence)


def _first_token(
    prefill: Callable[..., Iterable[Any]], sequence: Sequence, options: dict[str, Any]
) -> mx.array:
    """Reads the prompt. Returns the first token (1,), which is pending."""
    first, token = PendingToken(), mx.array([0])

    def take_logits(_: mx.array, logits: mx.array) -> mx.array:
        nonlocal token
        before = current_random_state()
        index = len(sequence.tokens)
        token, first.logprobs = sequence.choose(logits, index, sequence.context(index))
        if sequence.uses_random_state:
            first.random_state = mx.stack([before, current_random_state()])
        return logits

    # with a limit of 0, mlx-lm's loop reads the prompt and calls these once
    hooks = {"logits_processors": [take_logits], "sampler": lambda _: token, "max_tokens": 0}
    for _ in prefill(**(options | hooks)):
        pass
    sequence.pending.append(first)
    return token


def _leave_random_state(sequence: Sequence) -> None:
    """MLX's random state as mlx-lm's loop leaves it, which has drawn one token more."""
    if not sequence.uses_random_state:
        return
    states = sequence.random_states + [p.random_state for p in sequence.pending]
    index = sequence.n_yielded - sequence.n_begun
    known = states[index] if index < len(states) else None
    set_random_state(mx.random.split(current_random_state())[0] if known is None else known[1])


def _plain_steps(
    prompt: mx.array,
    model: nn.Module,
    stream: Any,
    proposer: Proposer,
    sequence: Sequence,
    options: dict[str, Any],
    context: list[int],
) -> Tokens:
    """mlx-lm's own loop, with the normal (dense) head or the unverified one. It calls the sampler
    and each processor once a token, in order."""
    sampler, processors = sequence.sampler, after(context, sequence.processors)
    if isinstance(sampler, Sampler):
        draw = sampler.for_text(sequence.seed, len(sequence.tokens))
        latest: list[mx.array] = []

        def hold(_: mx.array, logits: mx.array) -> mx.array:
            latest[:] = [logits]
            return logits

        if sampler.settings.greedy:
            sampler = None
        else:  # it draws from logits, which mlx-lm rounds to log-probabilities
            processors.append(hold)
            sampler = lambda logprobs: draw(latest[0] if latest else logprobs)  # noqa: E731
    hooks = {"sampler": sampler, "logits_processors": processors, "max_tokens": sequence.limit}
    with closing(generate_step(prompt, model, stream, **(options | hooks))) as steps:
        while True:
            with proposer.states() if proposer.unverified else nullcontext():
                step = next(steps, None)
            if step is None:
                return
            yield cast(int, step[0]), step[1]


def after(context: list[int], processors: Iterable[Processor] | None) -> list[Processor]:
    """Processors that see the tokens ``context`` before those of the loop."""
    if not context:
        return list(processors or ())
    prefix = mx.array(context, dtype=mx.uint32)

    def with_prefix(processor: Processor) -> Processor:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            return processor(mx.concatenate([prefix, tokens.astype(mx.uint32)]), logits)

        return process

    return [with_prefix(processor) for processor in processors or ()]


def drafted_steps(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    stream: Any = generation_stream,
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
    context, ids, text = list(context), cast(list[int], prompt.tolist()), []
    functions = list(logits_processors or ())
    caches = prompt_cache or make_prompt_cache(model) + make_prompt_cache(draft_model)
    cache = caches[: len(model.layers)]
    unknown = trust(sampler, functions) is Trust.UNKNOWN
    room = 0 if unknown else room_of_drafts(caches, len(ids) + num_draft_tokens)
    limit = max_tokens if room is None else min(max_tokens, room)
    if isinstance(sampler, Sampler):  # the same noise with drafts and without
        sampler = replace(sampler, seed=sampler.new_seed())
    length = max((length_of(layer) or 0 for layer in cache), default=0)
    if limit > 0:
        drafted = _drafted(
            prompt,
            model,
            draft_model,
            stream,
            sampler,
            [*context, *ids],
            max_tokens=limit,
            num_draft_tokens=num_draft_tokens,
            logits_processors=after([*context, *ids[:-1]], functions),
            prompt_cache=caches,
            **options,
        )
        begin(functions)
        with closing(drafted):
            for step in drafted:
                text.append(step[0])
                yield step
        if len(text) == max_tokens:
            return
    else:
        _log_once_without_drafts(type(model).__module__)
    whole = [*context, *ids, *text]
    held = len(context) + max((length_of(layer) or 0 for layer in cache), default=0) - length
    if held == len(whole):  # the last token is fed again
        trim_prompt_cache(cache, 1)
        held -= 1
    rest = mx.array(whole[held:], dtype=mx.uint32)
    steps = verified_steps(
        rest,
        model,
        stream,
        proposer=proposer,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=functions,
        prompt_cache=cache,
        context=whole[:held],
        n_begun=len(text),
        **options,
    )
    with closing(steps):
        for token, logprobs in steps:
            yield token, cast(mx.array, logprobs), False


def room_of_drafts(caches: Iterable[Any], n_tokens: int) -> int | None:
    """Tokens for which caches can be trimmed after ``n_tokens`` more: 0 if not at all, None for
    any number."""
    rooms: list[int] = []
    for layer in caches:
        if hasattr(layer, "caches"):
            inner = room_of_drafts(layer.caches, n_tokens)
            rooms += [] if inner is None else [inner]
        elif not trims(layer, ahead=0):
            rooms.append(0)
        elif getattr(layer, "max_size", None) is not None:
            rooms.append(max(0, layer.max_size - (length_of(layer) or 0) - n_tokens - 2))
    return min(rooms, default=None)


@once
def _log_once_without_drafts(architecture: str) -> None:
    log.warning(
        "This text is generated without drafts: a cache of %s models cannot be trimmed as drafts "
        "need it, or a sampler or processor must be called once a token.",
        architecture.rsplit(".", 1)[-1],
    )


def _drafted(
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    stream: Any,
    sampler: Sampler | SamplerFunction | None,
    before: list[int],
    *,
    max_tokens: int,
    num_draft_tokens: int,
    **options: Any,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """mlx-lm's loop with a draft model. Drafts and the target's choices are drawn with the noise of
    their position, so that the text is that without drafts. ``before``: context and prompt."""
    n_given = n_rows = 0  # tokens, and rows of this round: its drafts, then the target's choices

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal n_rows
        n_drafts = min(max_tokens - n_given, num_draft_tokens)
        first = n_given + (n_rows if n_rows < n_drafts else n_rows - n_drafts)
        rows = logprobs.reshape(-1, 1, logprobs.shape[-1])
        n_rows += len(rows)
        assert isinstance(sampler, Sampler) and sampler.seed is not None
        tokens = [sampler.choose(row, sampler.seed, first + i) for i, row in enumerate(rows)]
        return mx.concatenate(tokens)

    noisy = isinstance(sampler, Sampler) and not sampler.settings.greedy
    if isinstance(sampler, Sampler):
        options["sampler"] = draw if noisy else None
    else:
        options["sampler"] = sampler
    head = get_flash_head(draft_model)
    if head is get_flash_head(model):
        head = None  # it is the target's, which is dense
    latest = deque(before, LATEST)

    def project(hidden: mx.array) -> mx.array:
        assert head is not None
        ids = mx.array(sorted(set(latest)), dtype=mx.uint32)
        return head.draft_logits(hidden, ids, n_probes=policy_of(head).draft_probes)

    options |= {"max_tokens": max_tokens, "num_draft_tokens": num_draft_tokens}
    steps: Any = speculative_generate_step(prompt, model, draft_model, stream, **options)
    with closing(steps):
        while True:
            # a token at a time, since streams may take turns
            with nullcontext() if head is None else head.intercepted(project):
                step = next(steps, None)
            if step is None:
                return
            latest.append(step[0])
            n_given, n_rows = n_given + 1, 0
            yield step
