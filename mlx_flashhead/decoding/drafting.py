"""Text with a draft model.

Where wide steps of the target are established, its text is the one without a draft model, whatever
is drafted. Elsewhere mlx-lm's own speculative loop takes the text, and rounding may change it. What
must be called once a token gets no drafts.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cache as once
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.compat import mlx_lm as compat
from ..models.trained_drafter import TrainedDrafter
from ..models.training import may_drop_out
from .caches import are_known, length_of
from .guessing.draft_model import DraftModel
from .guessing.guesser import Guesser
from .guessing.guesses import has_wide_steps
from .guessing.trained import trained_drafts
from .loop import GuessedTokens, verified_tokens, with_guesses
from .phase import MAY_DIFFER, Mode
from .proposer import Proposer
from .sampling import Changes, Processor, Sampler, SamplerFunction, draw_of

log = logging.getLogger("mlx_flashhead")


def drafted_tokens(
    prompt: mx.array,
    model: nn.Module,
    draft_model: nn.Module | TrainedDrafter,
    stream: Any = compat.generation_stream,
    *,
    proposer: Proposer,
    num_draft_tokens: int = 2,
    sampler: Sampler | SamplerFunction | None = None,
    logits_processors: Iterable[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    context: Iterable[int] = (),
    announce: Callable[[Mode], object] | None = None,
    **options: Any,
) -> GuessedTokens:
    """Does what mlx-lm's ``speculative_generate_step`` does, with the text of no draft model.

    A trained drafter never changes a text: where there are no wide steps, it drafts nothing.

    Args:
        prompt: Tokens (n,).
        model: The target.
        draft_model: The model that proposes tokens, with a FlashHead or without, or a trained
            drafter.
        proposer: Has the settings.
        prompt_cache: Caches of both models, which hold the ``context`` already.
        context: Tokens that come before the prompt.
        announce: Called with how the text is decoded.
        **options: Further keywords of :func:`verified_tokens`, such as ``max_tokens``.

    The other arguments are those of ``speculative_generate_step``.

    Yields:
        Tokens, log-probabilities (V,), and whether the draft model has proposed the token.
    """
    caches = prompt_cache
    if not caches:
        caches = compat.make_prompt_cache(model) + new_draft_cache(draft_model)
    # Some layers may have none, so that there are fewer than layers.
    layers = caches[: len(compat.make_prompt_cache(model))]
    functions = list(logits_processors or ())
    verifiable = draw_of(sampler) is not None and Changes.of(functions) is not None
    known = verifiable and are_known(layers) and not may_drop_out(model)
    drafts = known and has_wide_steps(model, layers)
    if known and not drafts and not isinstance(draft_model, TrainedDrafter):
        _log_once_that_text_may_differ()
        for name in ("logprobs", "n_begun"):
            options.pop(name, None)
        plain: Any = compat.speculative_generate_step(
            prompt,
            model,
            draft_model,
            stream,
            num_draft_tokens=num_draft_tokens,
            sampler=sampler,
            logits_processors=functions,
            prompt_cache=caches,
            **options,
        )
        with closing(plain):
            for token in plain:
                if announce is not None:
                    announce(MAY_DIFFER)
                yield token
        return
    context = list(context)
    guesser = None
    if drafts:
        draft_layers = caches[len(layers) :]
        guesser = _guesser(
            proposer, draft_model, num_draft_tokens, layers, draft_layers, len(context)
        )
    else:
        _log_once_without_drafts(known)
    tokens = verified_tokens(
        prompt,
        model,
        stream,
        proposer=proposer,
        sampler=sampler,
        logits_processors=functions,
        prompt_cache=layers,
        context=context,
        guesser=guesser,
        announce=announce,
        **options,
    )
    try:
        yield from with_guesses(tokens, proposer)
    finally:
        # They may have been quantized on the way.
        caches[: len(layers)] = layers


def new_draft_cache(
    draft_model: nn.Module | TrainedDrafter, max_kv_size: int | None = None
) -> list[Any]:
    """New caches of the layers of what drafts, which may keep ``max_kv_size`` tokens alone."""
    if isinstance(draft_model, TrainedDrafter):
        return draft_model.make_cache()
    caches: list[Any] = compat.make_prompt_cache(draft_model, max_kv_size)
    return caches


def _guesser(
    proposer: Proposer,
    draft_model: nn.Module | TrainedDrafter,
    n_drafts: int,
    layers: list[Any],
    draft_layers: list[Any],
    n_context: int,
) -> Guesser:
    """What guesses in a text: a trained drafter, or a draft model.

    Args:
        proposer: Has the target.
        draft_model: What drafts.
        n_drafts: Tokens that it guesses at a time, at most.
        layers: The target's caches.
        draft_layers: Its own.
        n_context: Tokens that are known of those that the caches hold.
    """
    model = proposer.model
    if isinstance(draft_model, TrainedDrafter):
        proposer.hear_states()
        n_held = _length(layers)
        return trained_drafts(draft_model, model, n_drafts, layers, draft_layers, n_held)
    n_held = min(_length(draft_layers), n_context)
    return DraftModel(draft_model, model, draft_layers, n_drafts, n_held)


def _length(layers: list[Any]) -> int:
    """The tokens that caches hold."""
    return max((length_of(layer) or 0 for layer in layers), default=0)


@once
def _log_once_without_drafts(known: bool) -> None:
    why = (
        "its sampler or a processor must be called once a token, or its caches are not mlx-lm's own"
    )
    if known:
        why = (
            "no step of several tokens is known to leave the text of this model as it is on this "
            "machine"
        )
    log.warning("This text is generated without drafts: %s.", why)


@once
def _log_once_that_text_may_differ() -> None:
    log.warning(
        "This text is drafted by mlx-lm's own loop, and rounding may change it: no step of several "
        "tokens is known to leave the text of this model as it is on this machine."
    )
